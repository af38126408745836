"""The steps of a batch: manifests, storage, inputs, rendering, results. They use `scail`; flows use them."""

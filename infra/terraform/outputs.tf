output "environment" {
  description = "What the ConfigMap of infra/k8s, or .env of compose.yaml, has to say."
  value = {
    SCAIL_OUTPUT    = "gs://${google_storage_bucket.renders.name}/renders"
    SCAIL_INBOX     = "gs://${google_storage_bucket.inputs.name}/inbox"
    SCAIL_MANIFESTS = "gs://${google_storage_bucket.inputs.name}/manifests"
  }
}

output "checkpoints" {
  description = "Where `gcloud storage cp --recursive checkpoints/SCAIL-14B` puts the weights."
  value       = "gs://${google_storage_bucket.checkpoints.name}"
}

output "subscription" {
  description = "For `scail events --subscription`."
  value       = google_pubsub_subscription.uploads.id
}

output "accounts" {
  description = "For the annotations in infra/k8s/accounts.yaml."
  value = {
    coordinator = google_service_account.coordinator.email
    worker      = google_service_account.worker.email
  }
}

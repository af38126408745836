from __future__ import annotations

import torch
from torch import nn

from scail.mini.muon import Muon, make_optimisers, orthogonalised


def test_singular_values_become_one_and_the_vectors_stay():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 20, 50), (2, 50, 20)):
        matrices = torch.randn(shape, generator=generator)
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)

        found = orthogonalised(matrices)

        assert (torch.linalg.svdvals(found) - 1).abs().max() < 0.2
        torch.testing.assert_close(found, left @ right, rtol=0, atol=0.1)


def test_networks_of_one_shape_are_stepped_as_each_would_be_alone():
    torch.manual_seed(0)
    together = nn.ModuleList([nn.Linear(24, 32, bias=False), nn.Linear(24, 32, bias=False)])
    alone = [nn.Linear(24, 32, bias=False) for _ in together]
    for single, layer in zip(alone, together, strict=True):
        single.load_state_dict(layer.state_dict())
        layer.weight.grad = torch.randn_like(layer.weight)
        single.weight.grad = layer.weight.grad.clone()

    Muon(together.parameters(), lr=0.1, weight_decay=0.01).step()
    for single in alone:
        Muon(single.parameters(), lr=0.1, weight_decay=0.01).step()

    for single, layer in zip(alone, together, strict=True):
        torch.testing.assert_close(layer.weight, single.weight)


def test_every_parameter_has_one_optimiser_and_kernels_are_matrices():
    network = nn.Sequential(nn.Conv3d(16, 32, 3), nn.LayerNorm(32), nn.Conv3d(32, 3, 3))

    muon, adamw = make_optimisers(network, lr=1e-3, weight_decay=0.0)

    assert isinstance(muon, Muon)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [network[0].weight.shape]
    assert len(adamw.param_groups[0]["params"]) == len(list(network.parameters())) - 1


def test_a_linear_map_is_learnt():
    torch.manual_seed(0)
    wanted, network = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)
    (muon,) = make_optimisers(network, lr=3e-2, weight_decay=0.0)
    inputs = torch.randn(64, 24)
    losses = []
    for _ in range(30):
        loss = (network(inputs) - wanted(inputs).detach()).square().mean()
        losses.append(loss.item())
        network.zero_grad()
        loss.backward()
        muon.step()

    assert losses[-1] < 0.1 * losses[0]

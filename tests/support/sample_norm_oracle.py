"""The oracle of the per-sample norms: one backward pass a sample, in float64."""

import torch

from svag_fast import per_sample_sq_norms


def loss_of(output, cotangents):
    """A mean loss, not the same for any two samples, quadratic so that output gradients depend on the parameters."""
    if isinstance(output, tuple):
        output = output[0]
    per_sample = (output * cotangents + 0.5 * output.square()).flatten(1).sum(1)
    return per_sample.mean()


def loop(model, inputs, cotangents):
    """{name: |g_i|² [B]} and the whole |g_i|² by single-sample backward passes."""
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = {n: [] for n in names}
    for i in range(cotangents.shape[0]):
        output = model(*(x[i : i + 1] for x in inputs))
        grads = torch.autograd.grad(loss_of(output, cotangents[i : i + 1]), list(names.values()), allow_unused=True)
        for n, g in zip(names, grads, strict=True):
            rows[n].append(torch.zeros((), dtype=torch.float64) if g is None else g.square().sum())
    norms = {n: torch.stack(r) for n, r in rows.items()}
    return norms, torch.stack(list(norms.values())).sum(0)


def check(model, *inputs, rtol=1e-10):
    """Norms against the loop, and .grad against the plain backward pass; returns the norms."""
    model = model.double()
    with torch.no_grad():
        output = model(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    cotangents = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    inputs_plain = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    inputs_ours = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    model.zero_grad()
    loss_of(model(*inputs_plain), cotangents).backward()
    plain = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with per_sample_sq_norms(model) as norms:
        output = model(*inputs_ours)
        loss_of(output, cotangents).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=rtol, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")
    for ours, theirs in zip(inputs_ours, inputs_plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=rtol, atol=1e-13)
    each, total = loop(model, inputs, cotangents)
    assert set(norms) == set(each)
    for name, expected in each.items():
        torch.testing.assert_close(
            norms[name], expected, rtol=rtol, atol=1e-20, msg=lambda m, name=name: f"{name}: {m}"
        )
    torch.testing.assert_close(norms.total, total, rtol=rtol, atol=1e-20)
    assert (total > 0).all()
    return norms

"""What every network has to pass."""

import copy

import onnxruntime
import torch
from torch import nn

import modmask_kernels as mm


def check_network(model, inputs, output=lambda y: y, export=True, steps=2, **options):
    """Masks of all ones change nothing; learning leaves the weights; what is baked is plain.

    Args:
        inputs: a tuple of positional or a dict of keyword arguments, tensors with a batch of 4.
        output: the tensor that counts of what the model returns.
        options: of `mask_model`.

    Returns:
        The names of the masked parameters.
    """
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
    model.eval()
    names = list(model.state_dict())
    state = copy.deepcopy(model.state_dict())
    modules = [type(m) for m in model.modules()]

    def run(network):
        with torch.no_grad():
            return output(network(*args, **kwargs))

    expected = run(model)
    assert float(expected.std()) > 1e-6
    model = mm.mask_model(model, samples=2, init=100.0, **options)
    for mode in ("sample", "threshold", "off"):
        with mm.set_mode(model, mode):
            torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)

    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=1.0)
    assert all(p.requires_grad == n.endswith("_logits") for n, p in model.named_parameters())
    logits = copy.deepcopy([p for p in model.parameters() if p.requires_grad])
    mm.learn_masks(
        model,
        lambda y, batch: output(y).square().mean(),
        lambda step, generator: (inputs,),
        steps,
        lr=0.1,
        progress=False,
    )
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(logits, learned, strict=True) if a.numel())
    now = model.state_dict()
    assert all(torch.equal(now[name], t) for name, t in state.items())

    masks = mm.MaskSet.from_model(model)
    with mm.set_mode(model, "threshold"):
        found = run(model)
    assert not torch.allclose(found, expected)
    baked = masks.bake(model).eval()
    assert [type(m) for m in baked.modules()] == modules
    torch.testing.assert_close(run(baked), found, rtol=1e-4, atol=1e-4)
    if export:
        check_export(baked, args, kwargs, run(baked))

    model = mm.unmask_model(model)
    assert list(model.state_dict()) == names
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
    assert torch.equal(run(model), expected)
    return list(masks)


def check_export(baked, args, kwargs, expected):
    """The graphs of torch.export and ONNX have plain operators only, and compute the same."""
    program = torch.export.export(baked, args, kwargs)
    calls = {n.target for n in program.graph.nodes if n.op == "call_function"}
    operators = [c for c in calls if isinstance(c, torch._ops.OpOverload)]
    assert operators
    assert {c.namespace for c in operators} == {"aten"}
    onnx = torch.onnx.export(program, args=args, kwargs=kwargs, dynamo=True, verbose=False)
    assert {node.domain for node in onnx.model.graph} == {""}
    session = onnxruntime.InferenceSession(
        onnx.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = [*args, *kwargs.values()]
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
    results = [torch.as_tensor(r) for r in session.run(None, feeds)]
    same = [r for r in results if r.shape == expected.shape]
    assert same
    error = min(float((r - expected).abs().max()) for r in same)
    assert error <= 1e-3 * max(float(expected.abs().max()), 1.0)

"""Masks over the layers of any model, and off again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..nn import (
    MaskedAny,
    MaskedConv1d,
    MaskedConv2d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedGRU,
    MaskedGRUCell,
    MaskedHuggingFaceConv1D,
    MaskedLinear,
    MaskedLSTM,
    MaskedLSTMCell,
    MaskedModule,
    MaskedMultiheadAttention,
    Mode,
)
from ..nn.granularity import Granularity, check_competing, check_granularity, logits_shape
from ..nn.masked_module import (
    check_init,
    check_mode,
    check_tau,
    is_bias,
    name_sets,
    names_to_mask,
)
from ..nn.masked_transposed import InsOuts, is_hugging_face_conv1d, turned
from ..ops.estimators import GUMBEL_SIGMOID, Estimator, resolve
from ..ops.sample_mask.reference import threshold

# the masked counterpart of every plain layer that has one
MASKED_TYPES: dict[type[nn.Module], Any] = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.ConvTranspose1d: MaskedConvTranspose1d,
    nn.ConvTranspose2d: MaskedConvTranspose2d,
    nn.LSTM: MaskedLSTM,
    nn.GRU: MaskedGRU,
    nn.LSTMCell: MaskedLSTMCell,
    nn.GRUCell: MaskedGRUCell,
    nn.MultiheadAttention: MaskedMultiheadAttention,
}

_RECORD = "_mask_record"


@dataclass
class MaskRecord:
    """What `mask_model` notes on the model, to undo itself and to label mask files."""

    settings: dict[str, Any]
    requires_grad: dict[str, bool]
    # by name of the masked layer; in a plain dict, so that they are no submodules of the model
    dense: dict[str, nn.Module]
    # (module name, attribute, former value) of inference shortcuts that would skip a mask
    shortcuts: list[tuple[str, str, Any]] = field(default_factory=list)
    # how each set was learned last: seed, steps and settings
    learned: dict[str, dict[str, Any]] = field(default_factory=dict)


class MaskedTensor(NamedTuple):
    """One masked parameter of a model, with its logits [sets, ...]."""

    parameter: Tensor
    logits: nn.Parameter
    tensor_id: int
    n_of_m: tuple[int, int] | None = None
    estimator: Estimator = GUMBEL_SIGMOID
    tau: float = 1.0

    def kept(self, logits: Tensor) -> Tensor:
        """The threshold mask of logits of this parameter, one set, in their own shape."""
        return threshold(logits, self.n_of_m, self.estimator)

    @property
    def weights_per_logit(self) -> int:
        """How many weights one logit covers."""
        return self.parameter.numel() // max(self.logits[0].numel(), 1)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data-parallel wrappers; its names are the plain ones."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def masked_layers(model: nn.Module) -> dict[str, MaskedModule]:
    """The masked layers of a model by name, each once.

    Raises:
        ValueError: if there is none, or if they do not have the same sets.
    """
    layers = find_masked_layers(model)
    if not layers:
        raise ValueError("model: expected masked layers, found none; use mask_model first")
    (first_name, first), *others = layers.items()
    for name, layer in others:
        if layer.set_names != first.set_names:
            raise ValueError(
                f"model: the masked layers have different sets: {list(first.set_names)} in "
                f"{first_name!r}, {list(layer.set_names)} in {name!r}"
            )
    return layers


def find_masked_layers(model: nn.Module) -> dict[str, MaskedModule]:
    """As `masked_layers`, without the checks."""
    return {n: m for n, m in unwrapped(model).named_modules() if isinstance(m, MaskedModule)}


def masked_tensors(layers: dict[str, MaskedModule]) -> dict[str, MaskedTensor]:
    """Every masked parameter by name; tied ones once, under the name of the first layer."""
    found: dict[str, MaskedTensor] = {}
    seen: set[int] = set()
    for name, layer in layers.items():
        for leaf in layer.masked:
            parameter, logits = layer.get_parameter(leaf), layer.logits_of(leaf)
            if id(logits) in seen:
                continue
            seen.add(id(logits))
            full = f"{name}.{leaf}" if name else leaf
            found[full] = MaskedTensor(
                parameter,
                logits,
                layer.tensor_ids[leaf],
                layer.n_of_m(leaf),
                layer.estimator,
                layer.tau,
            )
    return found


def find_record(model: nn.Module) -> MaskRecord | None:
    """The record that `mask_model` left on the model, also when it was wrapped since."""
    for module in model.modules():
        record = module.__dict__.get(_RECORD)
        if isinstance(record, MaskRecord):
            return record
    return None


def counterpart(module: nn.Module, also: Sequence[type[nn.Module]] = ()) -> Any | None:
    """The class of masked layers for a plain one, or None; `also`: types for the general path."""
    for plain, masked in MASKED_TYPES.items():
        if isinstance(module, plain):
            return masked
    if any(is_hugging_face_conv1d(kind) for kind in type(module).__mro__):
        return MaskedHuggingFaceConv1D
    if isinstance(module, tuple(also)) and not isinstance(module, MaskedModule):
        return MaskedAny
    return None


def _has_counterpart(kind: Any) -> bool:
    """Whether it is itself a type that has a masked counterpart, not only a subclass of one."""
    return kind in MASKED_TYPES or is_hugging_face_conv1d(kind)


def _obstacle(module: nn.Module, masked: Any, in_attention: bool) -> str | None:
    """Why a layer cannot be replaced by one of the class `masked`, or None."""
    if in_attention:
        return "torch.nn.MultiheadAttention reads its weight without calling it"
    if masked is MaskedAny:
        return "it is never called" if type(module).forward is nn.Module.forward else None
    plain: Any = next(old for old in type(module).__mro__ if _has_counterpart(old))
    if type(module).forward is not plain.forward:
        return f"{type(module).__name__} has its own forward"
    weights = [(module, "weight")]
    if isinstance(module, nn.RNNBase):
        weights = [(module, name) for names in module._all_weights for name in names]
    elif isinstance(module, nn.RNNCellBase):
        weights = [(module, "weight_ih"), (module, "weight_hh")]
    if masked is MaskedMultiheadAttention:
        weights = [(module, "in_proj_weight"), (module.get_submodule("out_proj"), "weight")]
    if any(name not in owner._parameters for owner, name in weights):
        return "its weight is computed (parametrised or normalised)"
    return None


def _find_layers(
    model: nn.Module,
    accept: Callable[[str, nn.Module], bool] | None,
    also: Sequence[type[nn.Module]],
    bias: bool,
) -> dict[str, tuple[nn.Module, Any]]:
    """Layers to mask and their new classes by name; a warning names those that cannot be masked."""
    attention = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }
    chosen: dict[str, tuple[nn.Module, Any]] = {}
    left: list[str] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        masked = counterpart(module, also)
        if masked is None or id(module) in inside:
            continue
        if accept is not None and not accept(name, module):
            continue
        if masked is MaskedAny and not names_to_mask(module, bias, _below(name, accept)):
            continue  # a norm without weights, for instance
        if any(nn.parameter.is_lazy(p) for p in module.parameters()):
            raise ValueError(
                f"model: layer {name!r} has no shape yet; run the model once before mask_model"
            )
        reason = _obstacle(module, masked, id(module) in attention)
        if reason is None:
            chosen[name] = (module, masked)
            # what is masked as a whole owns the modules inside
            inside.update(id(child) for child in module.modules())
        else:
            left.append(f"{name!r} ({reason})")
    if left:
        warnings.warn(f"mask_model leaves these layers unmasked: {', '.join(left)}", stacklevel=3)
    return chosen


def maskable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What `mask_model` masks of a plain model unless told otherwise, by name; tied ones once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, (module, _) in _find_layers(model, None, (), False).items():
        for leaf in names_to_mask(module, False):
            parameter = module.get_parameter(leaf)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}.{leaf}" if name else leaf] = parameter
    return found


def _below(
    name: str, accept: Callable[[str, nn.Module], bool] | None
) -> Callable[[str, nn.Module], bool] | None:
    """`accept`, asked about a module by its name below the module `name`."""
    if accept is None:
        return None
    return lambda child, module: accept(f"{name}.{child}" if name else child, module)


def _granularities(
    granularity: Granularity | Callable[[str, nn.Module], Granularity],
    layers: Mapping[str, tuple[nn.Module, Any]],
    accept: Callable[[str, nn.Module], bool] | None,
    bias: bool,
) -> dict[str, Granularity]:
    """What one logit covers in each layer, checked against the layer's parameters."""
    chosen: dict[str, Granularity] = {}
    shapes: dict[int, tuple[str, tuple[int, ...]]] = {}
    for name, (module, masked) in layers.items():
        of_layer = granularity(name, module) if callable(granularity) else granularity
        chosen[name] = check_granularity(of_layer)
        transposed = issubclass(masked, InsOuts)
        for leaf in names_to_mask(module, bias, _below(name, accept)):
            parameter = module.get_parameter(leaf)
            if is_bias(leaf):
                continue
            try:
                own = turned(chosen[name], parameter.shape) if transposed else chosen[name]
                shape = logits_shape(own, parameter.shape)
            except ValueError as error:
                raise ValueError(f"{error} (layer {name!r})") from None
            first, expected = shapes.setdefault(id(parameter), (name, shape))
            if shape != expected or chosen[name] != chosen[first]:
                raise ValueError(
                    f"granularity: {first!r} and {name!r} share a weight, so they need the same, "
                    f"got {chosen[first]!r} and {chosen[name]!r}"
                )
    return chosen


def _described(granularity: object, chosen: Mapping[str, Granularity]) -> Any:
    """The granularity as plain values, for the record."""
    return dict(chosen) if callable(granularity) else granularity


def replace_modules(model: nn.Module, replacement: dict[int, nn.Module]) -> nn.Module:
    """Put `replacement[id(module)]` wherever that module sits; returns the root."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacement:
                parent._modules[name] = replacement[id(child)]
    return replacement.get(id(model), model)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let `target` use the very dictionaries of hooks of `source`, so that handles stay valid."""
    for name, value in vars(source).items():
        if "hook" in name:
            target.__dict__[name] = value


def close_shortcuts(
    model: nn.Module, kind: type[nn.Module] = MaskedModule
) -> list[tuple[str, str, Any]]:
    """Switch off the fused inference path of PyTorch's encoder where it would skip a mask.

    `kind`: what the layers are that have masks.
    """
    closed: list[tuple[str, str, Any]] = []

    def switch_off(name: str, module: nn.Module, attribute: str, value: Any) -> None:
        closed.append((name, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)

    for name, module in model.named_modules():
        if not any(isinstance(layer, kind) for layer in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            switch_off(name, module, "activation_relu_or_gelu", 0)
        elif isinstance(module, nn.TransformerEncoder):
            switch_off(name, module, "use_nested_tensor", False)
    return closed


def mask_model(
    model: nn.Module,
    sets: int | Sequence[str] = 1,
    samples: int = 4,
    estimator: str | Estimator = "gumbel_sigmoid",
    filter: Callable[[str, nn.Module], bool] | None = None,
    *,
    also: Sequence[type[nn.Module]] = (),
    bias: bool = False,
    tau: float | None = None,
    init: float = 2.0,
    antithetic: bool = False,
    eval_mode: Mode | None = None,
    eval_tau: float | None = None,
    inclusive: bool = False,
    granularity: Granularity | Callable[[str, nn.Module], Granularity] = "weight",
    batch_dim: int = 0,
) -> nn.Module:
    """Lay masks over the layers of a model, in place, and freeze all its weights.

    Every layer of a type in `MASKED_TYPES`, at any depth, becomes its masked counterpart over the
    same Parameters (`torch.nn.Linear` a `MaskedLinear`, and so on). A module that occurs at several
    places is converted once, and layers that share a weight share its logits. All parameters of
    the model stop requiring gradients; the logits require them.

    Args:
        model: any module; a bare layer works too, then use the returned module.
        sets: number of mask sets, or a list of their names.
        samples: masks drawn per set and batch (spec of the method: 4 to 8).
        estimator: how masks follow from logits and noise: "gumbel_sigmoid", "hard_concrete",
            "sigmoid", "threshold", "top_k", or one of `ops.estimators` with its numbers; see
            docs/estimators.md.
        filter: ``filter(name, module) -> bool``, True for the layers to mask; None masks all. Of a
            module with children that `also` names, those children are masked that it accepts too.
        also: further types of modules, `torch.nn.LayerNorm` or one of your own, whose parameters at
            any depth are masked by the general path: the module runs once per group, with a masked
            copy of its parameters, normalisations once for all (`nn.MaskedAny`).
        bias: whether biases are masked as well.
        tau, init: temperature (None: 2/3 for hard_concrete, else 1), and initial value of the
            logits.
        antithetic, eval_mode, eval_tau, inclusive: see `nn.MaskedModule`.
        granularity: what one logit covers, "weight", "row" or others (see `Granularity` and
            docs/granularity.md), or ``granularity(name, module)`` that says it for each layer.
        batch_dim: dimension of the batch in the inputs of the layers (1 for time-major models).

    Returns:
        The model, or, where the model itself is a layer to mask, its replacement.

    Raises:
        ValueError: for wrong options, if the model is masked already, if nothing is to be
            masked, or if a lazy layer has no shape yet.
        TypeError: for a model that is no module, and other options of a wrong type.

    Warns:
        UserWarning: for layers that cannot be masked: subclasses with their own forward,
            parametrised weights, and the output projection inside a `torch.nn.MultiheadAttention`
            that stays as it is; and for a type in `also` of which the model has no module.

    Source: Csordás et al. 2021, "Are Neural Nets Modular?", sections 2 and 3.
    """
    outer, model = model, unwrapped(model)
    names = name_sets(sets)
    rule = resolve(estimator)
    check_mode(eval_mode, "eval_mode")
    if eval_tau is not None:
        check_tau(eval_tau, "eval_tau")
    if not isinstance(batch_dim, int):
        raise ValueError(f"batch_dim: expected an integer, got {batch_dim!r}")
    if filter is not None and not callable(filter):
        raise TypeError(f"filter: expected a callable(name, module), got {type(filter).__name__}")
    if not isinstance(also, Iterable) or not all(isinstance(kind, type) for kind in also):
        raise TypeError(f"also: expected a list of types of modules, got {also!r}")
    tau = rule.default_tau if tau is None else tau
    check_tau(tau, "tau")
    check_init(init)
    masked = find_masked_layers(model)
    if masked:
        raise ValueError(
            f"model: expected no masked layers, found {next(iter(masked))!r} masked; build the "
            "model of plain layers, or take the masks off with unmask_model"
        )
    plain = _find_layers(model, filter, also, bias)
    if not plain:
        expected = ", ".join(f"torch.nn.{old.__name__}" for old in MASKED_TYPES)
        raise ValueError(
            f"model: expected at least one layer that can be masked ({expected})"
            + ("" if filter is None else " and that the filter accepts")
        )

    for kind in also:
        if not any(isinstance(module, kind) for module in model.modules()):
            warnings.warn(f"also: the model has no module of type {kind.__name__}", stacklevel=2)

    chosen = _granularities(granularity, plain, filter, bias)
    for of_layer in chosen.values():
        check_competing(of_layer, rule.name, eval_mode=eval_mode)
    number = {id(parameter): n for n, (_, parameter) in enumerate(model.named_parameters())}
    record = MaskRecord(
        settings={
            "estimator": rule.name,
            **({"estimator_options": rule.describe()} if rule.describe() else {}),
            "samples": samples,
            "tau": float(tau),
            "init": float(init),
            "bias": bool(bias),
            **({"antithetic": True} if antithetic else {}),
            **({} if granularity == "weight" else {"granularity": _described(granularity, chosen)}),
        },
        requires_grad={name: p.requires_grad for name, p in model.named_parameters()},
        dense={name: module for name, (module, _) in plain.items()},
    )
    weights = list(model.parameters())  # before logits sit beside those of children
    replacement: dict[int, nn.Module] = {}
    logits: dict[int, nn.Parameter] = {}
    for name, (module, masked_type) in plain.items():
        options: dict[str, Any] = {}
        if masked_type is MaskedAny:
            options["accept"] = _below(name, filter)
        if chosen[name] != "weight":
            options["granularity"] = chosen[name]
        layer: MaskedModule = masked_type.from_dense(
            module, sets=names, samples=samples, tau=tau, mask_bias=bias, init=init, **options
        )
        for leaf in layer.masked:
            parameter = layer.get_parameter(leaf)
            layer.tensor_ids[leaf] = number[id(parameter)]
            shared = logits.setdefault(id(parameter), layer.logits_of(leaf))
            layer._put_logits(leaf, shared)
        layer.batch_dim = batch_dim
        layer.estimator = rule
        layer.antithetic, layer.inclusive = antithetic, inclusive
        layer.eval_mode, layer.eval_tau = eval_mode, eval_tau
        share_hooks(module, layer)
        replacement[id(module)] = layer
    for parameter in weights:
        parameter.requires_grad_(False)
    masked_model = replace_modules(model, replacement)
    record.shortcuts = close_shortcuts(masked_model)
    setattr(masked_model, _RECORD, record)
    return outer if masked_model is model else masked_model


def unmask_model(model: nn.Module) -> nn.Module:
    """Undo `mask_model` in place: the former layers, with the same Parameters, unmasked.

    The masks are dropped, not multiplied in (`MaskSet.bake` does that), and every parameter
    requires gradients again if it did before.

    Args:
        model: a model with masked layers, by `mask_model` or built with them.

    Returns:
        The model, or, where the model itself is a masked layer, the plain layer.

    Raises:
        ValueError: if the model has no masked layers.
    """
    layers = find_masked_layers(model)
    if not layers:
        raise ValueError("model: expected masked layers, found none")
    outer, model = model, unwrapped(model)
    record = model.__dict__.pop(_RECORD, None)
    replacement: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        dense = record.dense.get(name) if record is not None else None
        if dense is None:
            dense = layer.dense_shell()
        # the Parameters of the layer, which a conversion of device or dtype may have replaced
        for leaf in dense._parameters:
            dense._parameters[leaf] = layer._parameters[leaf]
        for leaf in dense._buffers:
            dense._buffers[leaf] = layer._buffers[leaf]
        layer._drop_logits()
        for child in dense._modules:
            dense._modules[child] = layer._modules[child]
        if isinstance(dense, nn.RNNBase):
            dense._init_flat_weights()  # it keeps a list of its Parameters
        share_hooks(layer, dense)
        dense.train(layer.training)
        replacement[id(layer)] = dense
    plain = replace_modules(model, replacement)
    if record is not None:
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(record.requires_grad.get(name, parameter.requires_grad))
        for name, attribute, value in record.shortcuts:
            setattr(plain.get_submodule(name), attribute, value)
    return outer if plain is model else plain


class Switch:
    """A setting of all masked layers: effective at once, undone at the end of a `with` block."""

    def __init__(self, layers: Sequence[nn.Module], attributes: Sequence[str]) -> None:
        self._former = [
            (layer, {name: layer.__dict__[name] for name in attributes}) for layer in layers
        ]

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for layer, attributes in self._former:
            layer.__dict__.update(attributes)


def use_set(model: nn.Module, set: int | str | None) -> Switch:
    """Let one mask set work in all masked layers; None means all sets.

    Like `torch.set_grad_enabled`, it takes effect when called, and used in a `with` statement it
    restores what was before.

    Args:
        model: a model with masked layers.
        set: index or name of the set, or None.

    Raises:
        ValueError: if there is no such set, or no masked layer.
    """
    layers = list(masked_layers(model).values())
    active = None if set is None else (layers[0].set_index(set), 1)
    switch = Switch(layers, ("_active", "_views"))
    for layer in layers:
        layer.active_sets = active
    return switch


def set_mode(model: nn.Module, mode: Mode | None) -> Switch:
    """Set the mode of all masked layers: one of `MaskedModule.mode`, or None to follow training.

    Takes effect when called; used in a `with` statement it restores what was before.

    Raises:
        ValueError: for an unknown mode, or a model without masked layers.
    """
    check_mode(mode)
    layers = list(masked_layers(model).values())
    switch = Switch(layers, ("_mode",))
    for layer in layers:  # all or none
        check_competing(layer.granularity, layer.estimator.name, mode=mode)
    for layer in layers:
        layer.mode = mode
    return switch

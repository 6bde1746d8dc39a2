"""State dicts from files: which network they belong to, and loading them into a network completely or in part.

What does not fit is a WeightsError of one line.
"""

import http.client
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils import torch_files
from utils.checkpoint_fields import FIELDS
from utils.errors import WeightsError

State = dict[str, torch.Tensor]
Families = Mapping[str, Sequence[str]]  # name -> tensors that no other family has all of
CONNECT_SECONDS = 10
# What networks raise for arguments and numbers of classes that they cannot have, from files.
NO_NETWORK = (TypeError, ValueError, LookupError, RuntimeError, AttributeError, ArithmeticError)
MAX_NAMES = 20  # class names in one message


@dataclass
class NetworkWeights:
    """The weights of a complete network from a file, and what is known about them."""

    name: str  # architecture, see models.build
    state: State  # under the names of our networks
    num_classes: int
    classes: list[str] | None  # in label order; None if unknown
    arguments: dict  # of models.build
    label: str  # where they come from, for messages


def trained_weights(saved: Mapping) -> State:
    """The state dict in a dict read from a file, without `module.` in its names; averaged weights if there are any."""
    if isinstance(saved.get("ema"), dict) and saved["ema"]:
        saved = saved["ema"]
    for key in ("model", "state_dict"):
        if isinstance(saved.get(key), dict):
            saved = saved[key]
            break
    named = {name: value for name, value in saved.items() if isinstance(name, str) and torch.is_tensor(value)}
    return {name.removeprefix("module."): value for name, value in named.items()}


def open_weights(path_or_state_dict: str | Path | dict, source: str | None = None) -> tuple[dict, State, str]:
    """(dict as read, its state dict, name for messages). WeightsError if a tensor is not finite."""
    is_dict = isinstance(path_or_state_dict, dict)
    saved = path_or_state_dict if is_dict else torch_files.read(path_or_state_dict)
    state, label = trained_weights(saved), str(source or ("state dict" if is_dict else path_or_state_dict))
    torch_files.check_finite(label, state)
    return saved, state, label


def names_in(saved: Mapping) -> list[str] | None:
    """The class names in a dict read from a file; None if it has none."""
    classes = saved.get("classes")
    return list(classes) if FIELDS["classes"].fits(classes) and classes else None


def size_of(state: Mapping, name: str, label: str, dim: int = 0) -> int:
    """A dimension of a tensor, for class counts and widths. WeightsError if there is none."""
    if name not in state or state[name].ndim <= dim:
        raise WeightsError(f"{label}: {name} is missing or has another shape: not a complete file; use another copy")
    return state[name].shape[dim]


def open_network(
    path_or_state_dict: str | Path | dict, families: Families, describe: Callable[[str, State, str], NetworkWeights]
) -> NetworkWeights:
    """The NetworkWeights in a checkpoint of ours, or in a published file by describe(family, state, label)."""
    saved, state, label = open_weights(path_or_state_dict)
    if "architecture" not in saved:
        return describe(family_of(state, families, label), state, label)
    return NetworkWeights(
        saved["architecture"], state, saved["num_classes"], saved["classes"], saved["arguments"], label
    )


def fits(state: Mapping, families: Families) -> list[str]:
    """The families whose tensors are all in `state`."""
    return [name for name, tensors in families.items() if all(tensor in state for tensor in tensors)]


def family_of(state: Mapping, families: Families, label: str) -> str:
    """The first family whose tensors are all in `state`. WeightsError with the first keys if there is none."""
    if fitting := fits(state, families):
        return fitting[0]
    first = ", ".join(list(state)[:3]) or "no tensors"
    raise WeightsError(f"{label}: unknown weights (first keys: {first}); known families: {', '.join(families)}")


def with_counters(state: Mapping, own: Mapping) -> State:
    """`state` with the step counters of batch norm, taken from `own` where it has none: files before torch 0.4.1."""
    missing = [name for name in own if name.endswith("num_batches_tracked") and name not in state]
    return {**state, **{name: own[name] for name in missing}}


def build_strictly(build: Callable[[], nn.Module], state: Mapping, label: str) -> nn.Module:
    """The network that `build` makes, with the tensors of `state`, which must be exactly its own. Else WeightsError.

    What `build` does was read from a file. It is called without memory for tensors first: no network is made that is
    larger than the file.
    """
    try:
        with torch.device("meta"):
            outline = build()
    except WeightsError as error:
        raise WeightsError(f"{label}: {error}") from None
    except NO_NETWORK as error:
        reason = torch_files.first_line(error)
        raise WeightsError(f"{label}: its arguments are those of no network: {reason}; use another copy") from None
    _check_fit(outline, with_counters(state, outline.state_dict()), label)
    net = build()
    load_strictly(net, state, label)
    return net


def _check_fit(net, state, label):
    mismatches = torch_files.mismatches(state, net.state_dict())
    if mismatches:
        raise WeightsError(f"{label}: {len(mismatches)} tensors do not fit {net.name}, the first: {mismatches[0]}")


def load_strictly(net: nn.Module, state: Mapping, label: str) -> None:
    """Load the tensors of `state`, which must be exactly those of the network. Else WeightsError naming the first."""
    state = with_counters(state, net.state_dict())
    _check_fit(net, state, label)
    net.load_state_dict(state)


def load_matching(net: nn.Module, state: Mapping) -> tuple[int, int, list[str]]:
    """Load the tensors of `state` that `net` has by name and shape; the others keep their initial values.

    Returns (number loaded, number the network has, names not loaded). Fewer than half is a WeightsError.
    """
    own = net.state_dict()
    state = with_counters(trained_weights(state), own)
    loaded = {name: state[name] for name, value in own.items() if name in state}
    loaded = {
        name: value for name, value in loaded.items() if not torch_files.mismatches({name: value}, {name: own[name]})
    }
    skipped = [name for name in own if name not in loaded]
    if 2 * len(loaded) < len(own):
        raise WeightsError(
            f"only {len(loaded)} of {len(own)} tensors fit {net.name}, the first that does not: {skipped[0]}; "
            "is it a checkpoint of another network?"
        )
    net.load_state_dict(loaded, strict=False)
    return len(loaded), len(own), skipped


def load_with_classes(
    net: nn.Module,
    weights: NetworkWeights,
    heads: Iterable[str],
    anchors_per_cell: int = 1,
    background: bool = False,
    strict: bool = False,
) -> str:
    """Load a complete network, its class-specific layers by class name; returns a line for the console.

    heads             prefixes of the names of the class-specific layers
    anchors_per_cell  the first dimension of their tensors is [anchors_per_cell, classes, ...], flattened
    background        class 0 in them is background

    If the class names of both are known and the file has all those of `net.classes`, their rows are loaded. The layers
    of a file with another number of classes, or other names, keep their initial values, a WeightsError if `strict`. All
    other tensors must fit.
    """
    own, heads = net.state_dict(), tuple(heads)
    wanted, classes, state = getattr(net, "classes", None), weights.classes, weights.state
    other_names = bool(wanted and classes and list(wanted) != list(classes))
    if not other_names and weights.num_classes == net.num_classes:
        load_strictly(net, state, weights.label)
        return f"{len(own)} of {len(own)} tensors loaded"
    if other_names and set(wanted) <= set(classes):
        rows = [0] * background + [classes.index(name) + background for name in wanted]

        def select(value):
            count = anchors_per_cell * (len(classes) + background)
            if value.ndim == 0 or not len(value) or len(value) % count:
                return value  # of another shape, which load_strictly reports
            return value.unflatten(0, (anchors_per_cell, len(classes) + background, -1))[:, rows].flatten(0, 2)

        state = {name: select(value) if name.startswith(heads) else value for name, value in state.items()}
        load_strictly(net, state, weights.label)
        by_name = f"{len(wanted)} of its {weights.num_classes} classes by name"
        return f"{len(own)} of {len(own)} tensors loaded, {by_name}"
    if strict:
        raise WeightsError(f"{weights.label}: {other_classes(classes, wanted, weights.num_classes, net.num_classes)}")
    initial = {name: value for name, value in own.items() if name.startswith(heads)}
    load_strictly(net, {**state, **initial}, weights.label)
    counts = f"checkpoint {weights.num_classes} classes, data {net.num_classes}"
    names = " of other names" * (weights.num_classes == net.num_classes)
    return f"{counts}{names}: head re-initialized, {len(own) - len(initial)} of {len(own)} tensors loaded"


def other_classes(classes: Sequence[str] | None, wanted: Sequence[str] | None, given: int, count: int) -> str:
    """The end of an error: a file with `given` classes called `classes`, data with `count` called `wanted`."""
    if not (classes and wanted):
        return f"contains {given} classes, the data {count}; give the data that it was trained on"
    lists = [", ".join(names[:MAX_NAMES]) + " ..." * (len(names) > MAX_NAMES) for names in (classes, wanted)]
    remedy = "give the data that it was trained on, or continue its run with --resume"
    return f"its {given} classes are ({lists[0]}), the data's {count} ({lists[1]}); {remedy}"


def fetch(url: str) -> Path:
    """The file of a URL in torch.hub's folder, downloaded unless it is there. WeightsError if it cannot be.

    If its name contains the beginning of the SHA-256, as PyTorch's do (`name-5c106cde.pth`), the download is verified.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)  # torch.hub has no argument for it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # no connection; RuntimeError: wrong SHA-256
        raise WeightsError(f"cannot download {url} ({error}); put it at {path}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path

"""Files of weights: how they are read, and put into a network whole or in part.

A file is read with `weights_only=True`, always. What does not fit is a WeightsError of one line.
"""

import http.client
import pickle
import re
import socket
from pathlib import Path

import torch

from models.errors import WeightsError

CONNECT_SECONDS = 10


def read(path):
    """The dict in file `path`, tensors on the CPU; raises WeightsError if there is none or it cannot be trusted."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():
            raise WeightsError(f"{path}: damaged, or no weights file; fetch it again") from error
        raise WeightsError(
            f"{path}: holds a whole pickled object, and loading it would run code; save its state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise WeightsError(f"{path}: damaged, or no weights file; fetch it again") from error
    if not isinstance(saved, dict):
        raise WeightsError(f"{path}: holds a {type(saved).__name__}, not a dict of tensors")
    return saved


def trained_weights(saved):
    """The state dict in what `read` gave: averaged weights of ours before plain ones; names without `module.`."""
    if saved.get("ema"):
        saved = saved["ema"]
    for key in ("model", "state_dict"):
        if isinstance(saved.get(key), dict):
            saved = saved[key]
            break
    return {name.removeprefix("module."): value for name, value in saved.items() if torch.is_tensor(value)}


def open_weights(path_or_state_dict, source=None):
    """(dict as read, state dict, name for messages)."""
    saved = path_or_state_dict if isinstance(path_or_state_dict, dict) else read(path_or_state_dict)
    label = source or ("state dict" if saved is path_or_state_dict else path_or_state_dict)
    return saved, trained_weights(saved), str(label)


def family_of(state, families, label):
    """Name of the family whose marks are all in `state`; raises WeightsError with the first keys otherwise."""
    for name, marks in families.items():
        if all(mark in state for mark in marks):
            return name
    first = ", ".join(list(state)[:3]) or "no tensors"
    raise WeightsError(f"{label}: unknown weights (first keys: {first}); known families: {', '.join(families)}")


def with_counters(state, own):
    """`state` and, from `own`, the step counters of batch norm that files before torch 0.4.1 lack."""
    missing = [name for name in own if name.endswith("num_batches_tracked") and name not in state]
    return {**state, **{name: own[name] for name in missing}}


def load_strictly(net, state, label):
    """Every tensor of the file goes into the network and the other way round; else WeightsError naming the first."""
    own = net.state_dict()
    state = with_counters(state, own)
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in own]
    wrong += [
        f"{name} is {list(state[name].shape)}, not {list(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        raise WeightsError(f"{label}: {len(wrong)} tensors do not fit {net.name}, the first: {wrong[0]}")
    net.load_state_dict(state)


def load_matching(net, state):
    """Load the tensors of `state` that `net` has by name and shape, for fine-tuning; the others stay as they are.

    Returns (number taken, number the network has, names not taken). Below half is a WeightsError.
    """
    own = net.state_dict()
    state = with_counters(trained_weights(state), own)
    taken = {name: state[name] for name, value in own.items() if name in state and state[name].shape == value.shape}
    skipped = [name for name in own if name not in taken]
    if 2 * len(taken) < len(own):
        raise WeightsError(
            f"only {len(taken)} of {len(own)} tensors fit {net.name}, the first that does not: {skipped[0]}; "
            "is it a checkpoint of another network?"
        )
    net.load_state_dict(taken, strict=False)
    return len(taken), len(own), skipped


def fetch_file(url, path):
    """Download `url` to `path` where it does not lie yet; the path. Raises WeightsError with the URL and the reason.

    The beginning of the file's SHA-256 is checked where the URL has it, as PyTorch's do: `name-5c106cde.pth`.
    """
    path = Path(path)
    if path.is_file():
        return path
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)  # torch.hub has no argument for it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a temporary file beside it, then moved
        torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # URLError is an OSError, a wrong hash the last
        raise WeightsError(f"cannot fetch {url} ({error})") from error
    finally:
        socket.setdefaulttimeout(before)
    return path

"""Class names: where they come from and whether two lists agree."""

from pathlib import Path

from data.errors import DataError


def read_labels(path):
    """Names in a labels.txt, one a line. Blank lines and a BACKGROUND are skipped; a name twice is a DataError."""
    names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    names = [name for name in names if name and name.upper() != "BACKGROUND"]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(path, "", f"named twice: {', '.join(twice)}; keep one line for each class")
    if not names:
        raise DataError(path, "", "holds no class name; write one name a line")
    return names


def choose_classes(roots, found):
    """The class list of a training set: labels.txt where a root has one, then names found without one, sorted.

    Roots are joined in order. A name that a root's objects carry and no labels.txt knows is the caller's to report, so
    with any labels.txt present only its names are taken.
    """
    files = [Path(root) / "labels.txt" for root in roots if (Path(root) / "labels.txt").is_file()]
    if not files:
        return sorted(found)
    return list(dict.fromkeys(name for file in files for name in read_labels(file)))


def agree_on_classes(trained, found, remap_by_name):
    """Compare the class names in a checkpoint with those of the data; returns the checkpoint's list, which rules.

    Objects are mapped by name, so another order would do no harm here, but the labels.txt a person will ship beside the
    weights would be wrong: it is refused unless `remap_by_name`. Raises DataError.
    """
    if trained != found and set(trained) == set(found) and not remap_by_name:
        raise DataError(
            "labels.txt",
            "",
            f"the checkpoint's classes are ({', '.join(trained)}), the data's ({', '.join(found)}): the same names in "
            "another order; use --remap-by-name to keep the checkpoint's",
        )
    if not set(trained) & set(found):
        raise DataError(
            "labels.txt", "", f"no class in common: checkpoint ({', '.join(trained)}), data ({', '.join(found)})"
        )
    return trained


def class_weights(text, names):
    """[K+1] floats from "NAME=W,NAME=W", background first; background and classes not named weigh 1. None for "".

    Raises DataError for a name that is no class or a weight that is no number.
    """
    if not text:
        return None
    weights = [1.0] * (len(names) + 1)
    for item in text.split(","):
        name, _, weight = (part.strip() for part in item.partition("="))
        try:
            weights[names.index(name) + 1] = float(weight)
        except ValueError:
            raise DataError("--class-weights", item, f"write NAME=NUMBER; names: {', '.join(names)}") from None
    return weights

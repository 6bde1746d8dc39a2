"""Reading text files."""

from data.errors import DataError

NAMED = 3  # missing pictures named in a message


def lines_of(path):
    """The lines of a UTF-8 text file, one after the other; a byte order mark is skipped. Raises DataError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError:
        raise DataError(path, "", "not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise DataError(path, "", f"cannot be read: {error.strerror}") from None


def missing_pictures(file, place, folder, names):
    """One fault for all pictures that `file` names and `folder` lacks: annotations of a whole set beside some of its
    pictures are usual, and a line for each would bury everything else."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return DataError(file, place, f"no picture in {folder} for {', '.join(names[:NAMED])}{more}", kind="image")


def is_true(text):
    """Does a mark in an annotation, such as VOC's `difficult`, say yes? Missing or empty says no."""
    return (text or "").strip().lower() in ("1", "1.0", "true")

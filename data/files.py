"""Reading text files, finding files that lack, and keeping arrays."""

import os
import struct
import uuid
import zipfile

import numpy as np

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


def without_file(root, paths, rows):
    """int32, those of `rows` of the Paths `paths` whose file `root` lacks. Each folder is listed once: to ask for a
    million files one by one takes minutes on a network disk."""
    listings, lacking = {}, []
    for row in rows:
        folder, name = os.path.split(paths[row])
        if folder not in listings:
            where = os.path.join(root, folder)
            listings[folder] = set(os.listdir(where)) if os.path.isdir(where) else set()
        if name not in listings[folder]:
            lacking.append(row)
    return np.array(lacking, dtype=np.int32)


def is_true(text):
    """Does a mark in an annotation, such as VOC's `difficult`, say yes? Missing or empty says no."""
    return (text or "").strip().lower() in ("1", "1.0", "true")


def keep_arrays(file, arrays):
    """Write a dict of arrays to the .npz `file` in one step; False where its folder cannot be written."""
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")  # several processes may write one at a time
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            np.savez(stream, **arrays)
        os.replace(temporary, file)
    except OSError:
        if temporary.is_file():
            temporary.unlink()
        return False
    return True


def kept_arrays(file):
    """The arrays of a .npz that `keep_arrays` wrote, by name, read-only and not read yet: pages of the file come in
    where an array is looked at, and all processes of a machine share them.

    Raises OSError, ValueError or zipfile.BadZipFile where the file is damaged.
    """
    arrays = {}
    with open(file, "rb") as stream, zipfile.ZipFile(stream) as members:
        for member in members.infolist():
            stream.seek(member.header_offset)
            header = stream.read(30)  # of the zip, ending in the lengths of a name and of extra bytes
            if len(header) < 30 or member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{file}: {member.filename} is not an array as it was kept")
            stream.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            order = "F" if fortran else "C"
            empty = 0 in shape  # nothing of it can be mapped
            where = {"offset": stream.tell(), "shape": shape, "order": order}
            values = np.zeros(shape, dtype) if empty else np.memmap(file, dtype, "r", **where).view(np.ndarray)
            arrays[member.filename.removesuffix(".npy")] = values
    return arrays

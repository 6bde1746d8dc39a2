"""What is wrong with a person's data, said in one line."""


class DataError(Exception):
    """`path: place: reason`, for example `image_7.xml: object 3: xmax 12 < xmin 40`.

    `kind` tells what may be done about it: "box" faults cost one object and fall under --bad-boxes, "image" faults cost
    one picture and fall under --bad-images, anything else ("file") stops the run.

    A loader's worker hands an exception on as one text that begins with its own traceback; built from that text alone,
    the error keeps the line that a person needs.
    """

    def __init__(self, path, place="", reason="", kind="file"):
        path = str(path).rsplit("DataError: ", 1)[-1].strip()
        reason = " ".join(str(reason).split())  # one line, whatever text of a file it quotes
        self.path, self.place, self.reason, self.kind = path, str(place), reason, kind
        super().__init__(": ".join(part for part in (self.path, self.place, self.reason) if part))

"""The one exception of this room that a person is meant to read."""


class WeightsError(Exception):
    """A weights file, or an argument of a network, that does not fit; the message is one line and says what to do."""

"""Pure functions on tensors: box coding, matching, suppression, pixels. They know no network, no loss and no file."""

"""What the collectives of a program send."""

from collections import Counter


def sent_bytes(found):
    """Bytes that one device sends in a step, by kind and mesh axes."""
    total = Counter()
    for one in found.collectives:
        total[one.kind, one.axes] += one.sent_bytes
    return total

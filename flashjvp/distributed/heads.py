"""Which heads a rank of Ulysses computes, and which calls of attention they make: arithmetic alone."""

from typing import NamedTuple

from .positions import chunks


class Piece(NamedTuple):
    """One call of attention: of a rank's query heads, and of its key heads, each shared by as many query heads."""

    heads: slice
    kv_heads: slice


def key_heads(heads: range, group: int) -> range:
    """The key heads that a range of query heads needs, where `group` query heads share one."""
    return range(heads.start // group, -(-heads.stop // group)) if len(heads) else range(0)


def pieces(heads: range, group: int) -> list[Piece]:
    """The calls of a rank: one for the key heads all of whose query heads it has, one for each other key head."""
    found: list[Piece] = []
    needed = key_heads(heads, group)
    for kv_head in needed:
        sharing = range(max(kv_head * group, heads.start), min((kv_head + 1) * group, heads.stop))
        # mutate: piece
        piece = Piece(_at(sharing, heads), _at(range(kv_head, kv_head + 1), needed))
        if found and len(sharing) == group and _ratio(found[-1]) == group:
            last = found.pop()
            piece = Piece(
                slice(last.heads.start, piece.heads.stop), slice(last.kv_heads.start, piece.kv_heads.stop)
            )  # fmt: skip
        found.append(piece)
    return found


def shares(heads: int, kv_heads: int, ranks: int) -> tuple[list[range], list[range]]:
    """The query heads and the key heads of each rank. A key head may be needed by several."""
    of_queries = chunks(heads, ranks)
    group = heads // kv_heads if kv_heads else 1
    return of_queries, [key_heads(share, group) for share in of_queries]


def _at(part: range, whole: range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _ratio(piece: Piece) -> int:
    return (piece.heads.stop - piece.heads.start) // (piece.kv_heads.stop - piece.kv_heads.start)

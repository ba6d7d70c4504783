"""Which rank caches which tokens of a sequence, where its tokens are cut over ranks; pure Python.

The cut is by pages, round robin: a sequence's page k lies on the rank behind that of page k - 1.
While a sequence is decoded, the ranks therefore hold equal numbers of its tokens, to within one
page, at any length. (With one run of tokens per rank, the last rank would cache all new tokens and
read them at every step.) A rank's page is a page of the sequence, so kernels, block tables and page
accounting are those of a single rank. The pool chooses the rank of the first page: were it always
rank 0, a batch of short sequences would lie on rank 0 alone.

A page id names its rank: id i is page i // ranks of the cache of rank i % ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mlra.inference.checks import whole


@dataclass(frozen=True)
class TokenCut:
    """One rank's part of every sequence; with one rank, the whole sequence."""

    page_size: int
    ranks: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        whole("page size", self.page_size)
        whole("context parallel size", self.ranks)
        whole("context parallel rank", self.rank, 0, self.ranks - 1)

    def owner(self, page: int) -> int:
        """The rank that holds page id `page`."""
        return page % self.ranks

    def own_pages(self, pages: list[int]) -> list[int]:
        """This rank's pages of a sequence, in order, numbered as in this rank's cache."""
        return [page // self.ranks for page in pages[self._turn(pages) :: self.ranks]]

    def own_tokens(self, pages: list[int], tokens: int) -> int:
        """How many of a sequence's first `tokens` tokens lie in this rank's pages."""
        full, rest = divmod(tokens, self.page_size)
        turn = self._turn(pages)
        own = max(0, full - turn + self.ranks - 1) // self.ranks * self.page_size
        return own + (rest if full % self.ranks == turn else 0)

    def slot(self, pages: list[int], position: int) -> int:
        """This rank's slot for a sequence's token `position`; -1 if another rank caches it."""
        page = pages[position // self.page_size]
        if self.owner(page) != self.rank:
            return -1
        return page // self.ranks * self.page_size + position % self.page_size

    def _turn(self, pages: list[int]) -> int:
        """Index in `pages` of this rank's first page."""
        return (self.rank - pages[0]) % self.ranks

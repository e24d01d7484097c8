"""Prompt lookup: what followed a text's last tokens when they occurred before is drafted to follow again.

Drafted tokens are fed together with the last token and checked in one step, so that a text that repeats itself needs
fewer steps, each with its synchronisation. After prompt-lookup decoding (A. Saxena, 2023);
earlier occurrences are found through chains of equal pairs, as deflate finds its matches (RFC 1951, section 4).
"""

from __future__ import annotations

from array import array

MOST_DRAFTS = 15  # of one sequence in a step
_SHORTEST, _LONGEST = 2, 8  # matched tokens that count
_TRIED = 32  # earlier occurrences of a pair that are looked at
_MEMORY = 1 / 8  # weight of the newest success or failure
_PRIOR_COST, _PRIOR_WEIGHT = 0.1, 4.0
_FADE = 1 / 64  # of a step's weight, with each later one
_OUTLIER = 4.0  # times the mean: what a step can take without something else being to blame


class Lookup:
    """Drafts for one sequence.

    Every token is compared with the one expected for it, fed as a draft or not. So the chance that an expected token
    comes is known for each length of match, and where drafts would fail none are made: that costs a look-up a step.
    """

    def __init__(self) -> None:
        self._known = 0  # tokens indexed
        self._last: dict[int, int] = {}  # where the latest occurrence of a pair ends
        self._before = array("i")  # for the pair that ends with a token: where its occurrence before that ends, or 0
        self._source, self._matched = 0, 0  # the next token is expected to be this one; 0 for none
        self._chances = [1 - 1 / n for n in range(_SHORTEST, _LONGEST + 1)]

    def propose(self, tokens: list[int], most: int, cost: float) -> list[int]:
        """Return up to `most` tokens that are likely to follow, none where the expected gain is below the cost.

        tokens: the sequence so far; only grows from call to call. cost: of a drafted token, in steps without drafts.
        """
        self._take(tokens)
        if not self._source:
            self._find(tokens)
        if not self._source:
            return []
        drafts: list[int] = []
        chance, gain = 1.0, 1.0  # that all drafts are right; expected tokens of the step
        while len(drafts) < most:
            chance *= self._chances[self._bucket(self._matched + len(drafts))]
            if chance * (1 + cost * len(drafts)) < cost * gain:  # the step would yield fewer tokens a second
                break
            at = self._source + len(drafts)
            drafts.append(tokens[at] if at < len(tokens) else drafts[at - len(tokens)])  # a copy may run into itself
            gain += chance
        return drafts

    @staticmethod
    def _bucket(matched: int) -> int:
        return min(matched, _LONGEST) - _SHORTEST

    def _take(self, tokens: list[int]) -> None:
        """Index new tokens, and learn from those that were expected."""
        for i in range(self._known, len(tokens)):
            if self._source:
                hit, bucket = tokens[self._source] == tokens[i], self._bucket(self._matched)
                self._chances[bucket] += _MEMORY * (hit - self._chances[bucket])
                self._source, self._matched = (self._source + 1, self._matched + 1) if hit else (0, 0)
            pair = tokens[i - 1] << 32 | tokens[i] if i else -1  # one integer takes less memory than a tuple
            self._before.append(self._last.get(pair, 0))
            self._last[pair] = i + 1
        self._known = len(tokens)

    def _find(self, tokens: list[int]) -> None:
        """Find the longest of the latest matches of the last tokens."""
        end, tried = (self._before[-1] if self._before else 0), 0
        while end and tried < _TRIED and self._matched < _LONGEST:
            matched = _SHORTEST
            while matched < min(end, _LONGEST) and tokens[end - matched - 1] == tokens[-matched - 1]:
                matched += 1
            if matched > self._matched:
                self._source, self._matched = end, matched
            end, tried = self._before[end - 1], tried + 1


class DraftCost:
    """What a drafted token adds to a step, as a share of a step without drafts: a line through the steps' times.

    Where bytes are slow, or matrices are not waiting for memory, a drafted token can cost nearly a step of its own.
    """

    def __init__(self) -> None:
        self._n = self._x = self._t = self._xx = self._xt = 0.0  # sums over steps: drafts x, seconds t

    @property
    def share(self) -> float:
        """The share, from 0 to 1. Without steps that tell, a guess; also after a while without drafts."""
        if not self._n:
            return _PRIOR_COST
        spread, slope = self._xx - self._x**2 / self._n, self._xt - self._x * self._t / self._n
        found = _PRIOR_COST
        if spread > 1e-6:
            slope /= spread
            base = (self._t - slope * self._x) / self._n
            found = min(1.0, max(0.0, slope / base)) if base > 0 else 1.0
        return (spread * found + _PRIOR_WEIGHT * _PRIOR_COST) / (spread + _PRIOR_WEIGHT)

    def observe(self, drafted: int, seconds: float) -> None:
        """Take a step's drafted tokens and its time."""
        if self._n > 1:
            seconds = min(seconds, _OUTLIER * (1 + _PRIOR_COST * drafted) * self._t / self._n)
        new = (1.0, drafted, seconds, drafted**2, drafted * seconds)
        old = (self._n, self._x, self._t, self._xx, self._xt)
        self._n, self._x, self._t, self._xx, self._xt = ((1 - _FADE) * a + b for a, b in zip(old, new, strict=True))

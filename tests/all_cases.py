"""All tiny models: Llama and its likes, the other dense families, those with experts, those with recurrent state."""

from __future__ import annotations

from tests.tiny_dense import DENSE_CASES
from tests.tiny_models.case import Case
from tests.tiny_models.cases import CASES
from tests.tiny_sparse import SPARSE_CASES
from tests.tiny_state import STATE_CASES

FAMILY_CASES: dict[str, Case] = SPARSE_CASES | DENSE_CASES | STATE_CASES
ALL_CASES: dict[str, Case] = CASES | DENSE_CASES | SPARSE_CASES | STATE_CASES

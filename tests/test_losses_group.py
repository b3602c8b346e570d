"""The losses and topk_head with the vocabulary on 2 and 3 gloo ranks, against one head in float64.

The ranks run once for all tests of a process: see loss_group_rank.py.
Legend: V vocabulary, K top-k.
"""

from typing import Any

import pytest
import torch

from tests.gloo import run_ranks
from tests.loss_batch import EXACT
from tests.loss_group_rank import LOSSES, TOPKS, scored, top_k

WORLDS = (2, 3)
EVERYTHING = slice(None)


def seen_by(world: int) -> list[dict[str, Any]]:
    return [seen[world] for seen in run_ranks("tests.loss_group_rank", 3)[:world]]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_rank_has_the_loss_the_metrics_and_its_rows_gradient(name: str, world: int) -> None:
    expected = scored(name, EVERYTHING, None)
    every = [seen["losses"][name] for seen in seen_by(world)]
    assert expected["dweight"].abs().max() > 1e-6
    for key, value in expected.items():
        if key in ("dweight", "dbias"):
            torch.testing.assert_close(torch.cat([own[key] for own in every]), value, **EXACT)
            continue
        for own in every:
            assert own[key].nan_to_num().equal(every[0][key].nan_to_num()), key
            torch.testing.assert_close(own[key], value, **EXACT, equal_nan=True)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", TOPKS)
def test_the_top_k_of_slices_is_that_of_one_head(name: str, world: int) -> None:
    ids, logprobs, mass = top_k(**TOPKS[name], own=EVERYTHING, group=None)
    every = [seen["topks"][name] for seen in seen_by(world)]
    exact = EXACT if logprobs.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for own_ids, own_logprobs, own_mass in every:
        assert own_ids.equal(every[0][0])
        assert own_logprobs.equal(every[0][1])
        torch.testing.assert_close(own_logprobs, logprobs, **exact)
        torch.testing.assert_close(own_mass, mass, **exact)
        # Which of the forbidden come first is left open; each token is there once.
        possible = logprobs > float("-inf")
        assert own_ids[possible].equal(ids[possible])
        assert own_ids.sort(-1).values.equal(ids.sort(-1).values)


@pytest.mark.parametrize("world", WORLDS)
def test_what_topk_head_can_not_do_with_a_group_is_one_line(world: int) -> None:
    for seen in seen_by(world):
        assert seen["errors"]["k"] == "topk_head: k must lie in [1, 23], the vocabulary; got 24"
        assert seen["errors"]["backend"].startswith("topk_head: group wants backend='cpu'")

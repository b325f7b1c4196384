"""Reused vectors against a plain loop: which are computed, which values come back, and that no gradient is lost."""

import numpy as np
import pytest
import torch

from trainer.exchange.reuse import VectorCache

ROWS, WIDTH, STEPS = 9, 3, 40


@pytest.mark.parametrize("reuse_steps", [1, 2, 5])
def test_against_a_plain_loop(reuse_steps: int) -> None:
    draw = np.random.default_rng(reuse_steps)
    cache = VectorCache(ROWS, WIDTH, reuse_steps, torch.device("cpu"), torch.float64)
    made_at: dict[int, int] = {}
    kept: dict[int, torch.Tensor] = {}
    waiting = {place: torch.zeros(WIDTH, dtype=torch.float64) for place in range(ROWS)}
    reused = 0
    for step in range(STEPS):
        places = draw.permutation(ROWS)[: draw.integers(0, ROWS + 1)]
        places = np.where(draw.random(len(places)) < 0.1, -1, places)  # some keys have no feature
        plan, fresh_Q = cache.plan(places)
        expected_fresh = [p < 0 or step - made_at.get(int(p), -1000) > reuse_steps for p in places]
        assert fresh_Q.tolist() == expected_fresh
        computed = torch.from_numpy(draw.normal(size=(int(fresh_Q.sum()), WIDTH))).requires_grad_()
        vectors = cache.combine(plan, computed)
        gradient = torch.from_numpy(draw.normal(size=(len(places), WIDTH)))
        vectors.backward(gradient)
        number = 0
        for row, (place, fresh) in enumerate(zip(places.tolist(), expected_fresh, strict=True)):
            if not fresh:
                reused += 1
                assert torch.equal(vectors[row], kept[place])
                waiting[place] = waiting[place] + gradient[row]
                continue
            assert torch.equal(vectors[row], computed[number])
            late = waiting[place] if place >= 0 else torch.zeros(WIDTH, dtype=torch.float64)
            assert computed.grad is not None
            torch.testing.assert_close(computed.grad[number], gradient[row] + late)
            if place >= 0:
                made_at[place], kept[place] = step, computed[number].detach()
                waiting[place] = torch.zeros(WIDTH, dtype=torch.float64)
            number += 1
    assert reused > STEPS

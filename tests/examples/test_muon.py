"""examples/studies/muon.py: every clip trains, from the same start."""

import muon
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.mark.slow
def test_every_clip_trains():
    found = muon.main(
        steps=5, seeds=2, rates=(0.0, 0.02), width=8, batch_size=2, length=8
    )
    assert list(found) == list(muon.ARMS)
    losses = np.array(list(found.values()))
    assert losses.shape == (5, 2, 2)
    # The mean of the last step alone: without a step, all are as they began.
    np.testing.assert_allclose(losses[:, 0], np.broadcast_to(losses[0, 0], (5, 2)))
    assert np.all(np.isfinite(losses))
    assert not np.any(losses[:, 1] == losses[:, 0])


def test_the_matrices_of_the_blocks_are_muons():
    assert muon.is_muons("blocks/0/qkv/kernel")
    assert not muon.is_muons("blocks/0/rise/bias")
    assert not muon.is_muons("head/kernel")

"""Mixup: each image's part in its loss is its part in what the network sees, in runs with further losses."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from elastic.errors import OptionError, TrainingError
from elastic.experiments.train import train
from elastic.training.tasks import Classification
from tests.fitted import EXACT, prepare
from tests.runs import configure

BATCH = 500  # other batches are smaller
TRAINING = (*EXACT, f"data.batch_size={BATCH}", "trainer.max_epochs=1", "task.mixup=0.5")


def test_an_image_counts_as_much_in_the_loss_as_it_is_seen() -> None:
    torch.manual_seed(0)
    B, K = 64, 10
    task, x_BCHW, y_B = Classification(K, mixup=0.4), torch.eye(B)[:, None, None], torch.randint(K, (B,))
    mixed_BCHW, targets = task.mix(x_BCHW, y_B)
    parts_BB = mixed_BCHW[:, 0, 0]  # of each image, in each mixed one
    torch.testing.assert_close(parts_BB.sum(1), torch.ones(B))
    others_B = 1 - parts_BB.diagonal()
    assert 0 <= others_B.min() < 0.05 and 0.35 < others_B.max() <= 0.4
    assert ((parts_BB > 0).sum(1) <= 2).all()
    logits_BK = torch.randn(B, K)
    by_hand = -(parts_BB * logits_BK.log_softmax(1)[:, y_B]).sum(1).mean()
    torch.testing.assert_close(task.compute_training_loss(logits_BK, targets), by_hand)
    torch.testing.assert_close(task.compute_loss(logits_BK, y_B), F.cross_entropy(logits_BK, y_B))


def test_without_mixup_nothing_is_drawn() -> None:
    x_BCHW, y_B = torch.randn(4, 1, 2, 2), torch.arange(4)
    before = torch.get_rng_state()
    assert all(a is b for a, b in zip(Classification(4).mix(x_BCHW, y_B), (x_BCHW, y_B), strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(OptionError, match=r"mixup=0.6 cannot be: set it to a number from 0 to 0.5"):
        Classification(4, mixup=0.6)
    with pytest.raises(TrainingError, match="set task=multilabel"):
        Classification(4, mixup=0.5).mix(torch.zeros(2, 1, 2, 2), torch.zeros(2, 4))


def test_a_teacher_sees_the_mixed_images(tmp_path: Path) -> None:
    first = tmp_path / "first"
    train(configure(first, *TRAINING, "schedule=static"), first)
    run = prepare(tmp_path / "taught", *TRAINING, "schedule=[static,distil]", f"init={first}")
    seen: dict[str, list[torch.Tensor]] = {"teacher": [], "net": []}
    for name, net in {"teacher": run.callbacks["distil"].teacher, "net": run.module.net}.items():
        net.register_forward_pre_hook(
            lambda net, args, kept=seen[name]: kept.append(args[0]) if len(args[0]) == BATCH else None
        )
    run.fit()
    assert len(seen["teacher"]) == len(seen["net"]) > 0
    assert all(torch.equal(a, b) for a, b in zip(seen["teacher"], seen["net"], strict=True))


@pytest.mark.slow
def test_levels_and_modules_learn_from_mixed_images(tmp_path: Path) -> None:
    for schedule in ("joint", "dynamic"):
        summary = train(
            configure(tmp_path / schedule, *TRAINING, f"schedule={schedule}"), tmp_path / schedule
        )
        assert summary["levels"] or summary["sets"]

import pytest
import torch

from tests.training import small_run
from training.checkpoint import Progress
from training.plan import Plan, lr_scale
from utils.errors import UsageError


def plan(words="", num_images=20):
    """The plan of a run over 20 images, with batches of 4 if `words` give no other: an epoch has 5 steps."""
    return Plan(small_run.flags(words), num_images)


def due_steps(words, name, num_images=20):
    """The steps of a whole run after which `name` is due."""
    planned, progress, steps = plan(words, num_images), Progress(), []
    for step in range(1, planned.total_steps + 1):
        due = planned.advance(progress)
        assert progress.step == step
        if getattr(due, name):
            steps.append(step)
    return steps


@pytest.mark.parametrize(
    ("words", "total_steps"),
    [
        ("--epochs 3", 15),
        ("--epochs 3 --batch-size 8", 8),  # 7.5 steps: the last one sees images of the next epoch
        ("--epochs 3 --steps 7", 7),
        ("--epochs 3 --max-steps 4", 4),
        ("--epochs 3 --max-steps 99", 15),
        ("--steps 7 --max-steps 9", 7),
        ("--epochs 3 --steps 7 --preflight", 1),
    ],
)
def test_total_steps(words, total_steps):
    assert plan(words).total_steps == total_steps


def test_an_epoch_ends_with_the_step_that_sees_its_last_image():
    planned = plan("--batch-size 6")
    assert [planned.steps_in(epochs) for epochs in (1, 2, 3, 0.5)] == [4, 7, 10, 2]
    ends = {step: planned.epochs_completed(step) for step in range(1, 11)}
    assert {step: epoch for step, epoch in ends.items() if epoch} == {4: 1, 7: 2, 10: 3}


def test_a_batch_larger_than_the_data_set_completes_several_epochs():
    assert [plan("--batch-size 50").epochs_completed(step) for step in (1, 2)] == [2, 5]


def test_log_is_due_at_its_interval_and_with_every_checkpoint():
    assert due_steps("--epochs 2 --log-every 4", "log") == [4, 5, 8, 10]
    assert due_steps("--steps 7 --log-every 100", "log") == [5, 7]


def test_validation_is_due_at_its_interval_and_at_the_last_step():
    assert due_steps("--epochs 3", "validate") == [5, 10, 15]
    assert due_steps("--epochs 5 --validation-epochs 2", "validate") == [10, 20, 25]
    assert due_steps("--epochs 2 --validation-steps 4", "validate") == [4, 8, 10]
    assert due_steps("--epochs 3 --max-steps 7", "validate") == [5, 7]


def test_a_checkpoint_is_due_after_epochs_validations_and_at_the_last_step():
    assert due_steps("--epochs 2 --validation-epochs 9", "save") == [5, 10]
    assert due_steps("--epochs 2 --validation-steps 4 --max-steps 7", "save") == [4, 5, 7]
    assert due_steps("--epochs 2 --save-every-steps 3 --max-steps 7", "save") == [3, 5, 6, 7]


def test_stop_is_due_at_the_last_step_alone():
    assert due_steps("--epochs 2", "stop") == [10]


def test_copies_are_kept_at_their_interval():
    words = "--epochs 4 --save-every-epochs 2 --save-epochs 1,4 --save-every-steps 10"
    planned = plan(words)
    copies = {step: planned.copies(step) for step in range(1, 21)}
    assert {step: names for step, names in copies.items() if names} == {
        5: ["epoch_001.pt"],
        10: ["epoch_002.pt", "step_000010.pt"],
        20: ["epoch_004.pt", "step_000020.pt"],
    }


def test_a_signal_saves_and_stops_and_leaves_the_validation_to_the_next_run():
    planned, progress = plan("--epochs 1 --validation-steps 1"), Progress()
    due = planned.advance(progress, stopping=True)
    assert (due.log, due.validate, due.save, due.stop) == (True, False, True, True)
    assert progress.validation_due
    due = planned.start(progress)
    assert (due.validate, due.stop) == (True, False)


def test_a_run_that_was_stopped_between_validations_goes_on_without_one():
    planned, progress = plan("--epochs 1 --validation-steps 2"), Progress()
    planned.advance(progress, stopping=True)
    assert not progress.validation_due
    due = planned.start(progress)
    assert (due.validate, due.stop) == (False, False)


@pytest.mark.parametrize("validation_due", [True, False])
def test_at_the_end_of_a_run_only_an_interrupted_validation_is_left(validation_due):
    due = plan("--epochs 1").start(Progress(step=5, validation_due=validation_due))
    assert (due.validate, due.save, due.stop) == (validation_due, False, True)
    preflight = plan("--epochs 1 --preflight").start(Progress(step=5, validation_due=validation_due))
    assert (preflight.validate, preflight.stop) == (False, False)


def test_patience_counts_validations_since_the_best():
    assert [plan("--patience 2").is_stale(Progress(stale=stale)) for stale in (1, 2, 3)] == [False, True, True]
    assert not plan("").is_stale(Progress(stale=9))
    assert not plan("--patience 2 --preflight").is_stale(Progress(stale=2))


def test_due_counts_the_steps_since_losses_were_logged():
    planned, progress = plan("--epochs 2 --log-every 3"), Progress()
    due = [planned.advance(progress) for _ in range(10)]
    assert [d.steps for d in due if d.log] == [3, 2, 1, 3, 1]
    assert [d.epoch for d in due] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 2]


def test_a_resumed_run_has_the_same_plan():
    words = "--epochs 3 --log-every 4 --save-every-steps 7 --validation-steps 6"
    whole, progress = plan(words), Progress()
    expected = [whole.advance(progress) for _ in range(15)]
    for saved in [step for step, due in enumerate(expected, start=1) if due.save and step < 15]:
        resumed, progress = plan(words), Progress(step=saved, epoch=saved // 5)
        assert [resumed.advance(progress) for _ in range(saved, 15)] == expected[saved:]
        assert progress.epoch == 3


def test_the_schedule_is_in_epochs_or_in_steps():
    assert plan("--milestones 1,2 --gamma 0.1").milestones == [5, 10]
    assert plan("--milestone-steps 7,8").milestones == [7, 8]
    factors = [plan("--milestones 1,2 --gamma 0.5").lr_factor(step) for step in (4, 5, 9, 10)]
    assert factors == [1, 0.5, 0.5, 0.25]
    assert plan("--scheduler constant --warmup-steps 4").lr_factor(1) == 0.5
    assert plan("--scheduler plateau --warmup-steps 4").lr_factor(1) == 0.5
    assert plan("--scheduler cosine --epochs 2").lr_factor(5) == pytest.approx(0.5)
    assert plan("--scheduler cosine --epochs 9 --t-max 2").lr_factor(5) == pytest.approx(0.5)
    assert plan("--scheduler cosine --epochs 2 --warmup-steps 10").lr_factor(5) == pytest.approx(0.5 * 0.6)


def test_an_automatic_warmup_is_the_first_epoch():
    auto = "--scheduler constant --warmup-steps auto"
    assert [plan(auto).lr_factor(step) for step in (0, 3, 4, 5)] == pytest.approx([0.2, 0.8, 1, 1])  # 5 steps
    assert plan(f"{auto} --warmup-factor 0.001").lr_factor(0) == 0.001
    assert plan(f"{auto} --batch-size 1", 5000).warmup_steps == 1001


def test_max_steps_does_not_change_the_schedule():
    assert plan("--scheduler cosine --epochs 2 --max-steps 3").lr_factor(5) == pytest.approx(0.5)


def test_each_group_keeps_its_own_rate():
    parameters = [{"params": [torch.zeros(1)], "base_lr": rate} for rate in (0.2, 1.0)]
    optimizer = torch.optim.SGD(parameters, lr=9.0)
    words = "--scheduler plateau --warmup-steps 2 --batch-size 8 --lr-batch-size 4 --scale-lr"
    planned = plan(words)
    planned.plateau.factor = 0.1
    planned.set_lr(optimizer, 0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2 * 2 * 0.5 * 0.1, 2 * 0.5 * 0.1])


def test_the_plateau_looks_at_the_mean_loss_of_epochs():
    planned, progress = plan("--scheduler plateau --epochs 20 --log-every 2"), Progress()
    factors = []
    for _ in range(6):
        for loss in (1.0, 3.0, 2.0):  # epochs are logged in parts of 2, 2, 1 or of 1, 2, 2 steps
            due = planned.advance(progress)
            while not due.log:
                due = planned.advance(progress)
            planned.record_loss(due, loss)
        factors.append(planned.plateau.factor)
    assert planned.plateau.best == 2.0
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1])
    off = plan("--scheduler constant")
    off.record_loss(due, 1.0)
    assert off.plateau.state_dict() == {}


@pytest.mark.parametrize(
    ("lr_batch_size", "scale", "factor", "warns"), [(0, False, 1, False), (8, True, 2, False), (8, False, 1, True)]
)
def test_learning_rates_for_another_batch_size(lr_batch_size, scale, factor, warns):
    printed = []
    assert lr_scale(16, lr_batch_size, scale, printed.append) == factor
    assert len(printed) == warns
    assert not warns or "--scale-lr would multiply them by 2" in printed[0]


def test_learning_rates_for_an_unknown_batch_size_are_not_scaled():
    with pytest.raises(UsageError, match=r"--scale-lr: .* give --lr-batch-size"):
        lr_scale(16, 0, True)

"""Every trap that a run has confirmed, in two halves: the naive form fails in this very torch, and
the package's form stands.

`TRAPS` says which function here shows the naive form and which tests, here or in another file,
hold the guard. A naive form that no longer fails makes its test fail: then say here what holds
now. A test that is renamed or lost is missed by name.
"""

import inspect
import io
import math
import os
import pickle
import re
import resource
import signal as signals
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmemo.core.batch import Batch, Stream, masked_mean, masked_std
from mmemo.core.errors import CheckpointError, ConfigError
from mmemo.models.attention import Clock
from mmemo.models.audiovisual import LogMel
from mmemo.models.base import ConcatFusion, Multimodal, Project, RegressionHead
from mmemo.models.fusion import ConcatNorm
from mmemo.training.checkpoint import load_weights, save_checkpoint
from mmemo.training.history import History
from mmemo.training.loop import fit
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan, count_plateaus, parameter_groups, rate_factor
from mmemo.training.tracking import QUIET
from mmemo.training.update import NonFiniteError

HERE = Path(__file__).parent


def value_and_slope(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    y.backward()
    return y.item(), x.grad


def said(predictions, targets):
    N = len(next(iter(targets.values())))
    return SimpleNamespace(predictions=predictions), Batch(
        {"audio": Stream.of(torch.zeros(N, 1, 1), rate=1)}, targets
    )


def loss(objective, prediction, target):
    return objective(*said({"y": prediction}, {"y": target}))["loss"]


def is_nan(x):
    return bool(torch.as_tensor(x).isnan().any())


# --- naive forms: each asserts that it fails, and how


def naive_root():
    right = torch.zeros(4)
    for form in (lambda e: e.square().mean().sqrt(), lambda e: e.square().mean().sqrt() + 1e-8):
        value, slope = value_and_slope(form, right)
        assert value <= 1e-8 and slope.isnan().all()
    value, slope = value_and_slope(lambda e: e.square().mean().add(1e-8).sqrt(), right)
    assert value == pytest.approx(1e-4) and not slope.any()


def naive_root_in_float16():
    assert torch.tensor(1e-8).half() == 0
    assert is_nan(
        value_and_slope(lambda e: e.square().mean().add(1e-8).sqrt(), torch.zeros(4).half())[1]
    )


def naive_correlation():
    one = torch.ones(4)

    def naive_ccc(p, t, eps=0.0):
        spread = p.var(correction=0) + t.var(correction=0) + (p.mean() - t.mean()).square()
        return 1 - 2 * ((p - p.mean()) * (t - t.mean())).mean() / (spread + eps)

    value, slope = value_and_slope(lambda p: naive_ccc(p, one), one)
    assert math.isnan(value) and is_nan(slope)
    value, slope = value_and_slope(lambda p: naive_ccc(p, one, 1e-8), one)
    assert value == 1 and not slope.any()

    def pearson(p):
        t = torch.arange(4.0)
        a, b = p - p.mean(), t - t.mean()
        return 1 - (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt() + 1e-8)

    value, slope = value_and_slope(pearson, one)
    assert value == 1 and is_nan(slope)
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert is_nan(torch.tensor([3.0]).std())


def naive_batchnorm_of_one():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(torch.randn(1, 3))


def naive_layernorm_of_one_feature():
    norm = nn.LayerNorm(1)
    nn.init.constant_(norm.bias, 0.7)
    assert torch.equal(norm(torch.randn(5, 1)), torch.full((5, 1), 0.7)), (
        "whatever comes in, the bias goes out"
    )


def naive_sums_in_float16():
    x = torch.linspace(-300, 300, 9).half()
    assert (x - x.mean()).square().mean().isinf() and x.var().isfinite(), (
        "torch's own is computed in float32"
    )
    assert (torch.full((4000,), 90.0).half().sum() / 4000).isinf()


def naive_masked_attention():
    q, hidden = torch.randn(2, 3, 4), torch.tensor([[False] * 3, [True] * 3])
    for weights in (True, False):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(4, 2, batch_first=True)
        out = attention(q, q, q, key_padding_mask=hidden, need_weights=weights)[0]
        out[0].sum().backward()  # the empty row takes no part in the loss
        assert out[0].isfinite().all() and is_nan(out[1]) == weights, (
            "asking for the maps changes the numbers"
        )
        assert bool(attention.in_proj_weight.grad.isnan().any()) == weights
        if not weights:
            assert not out[1].any()
    assert torch.full((3,), -math.inf).softmax(0).isnan().all()
    assert not F.scaled_dot_product_attention(
        q, q, q, attn_mask=(~hidden)[:, None].expand(2, 3, 3)
    )[1].any()


def naive_where_behind_a_softmax():
    hidden = torch.tensor([[False] * 3, [True] * 3])
    s = torch.randn(2, 3, requires_grad=True)
    w = torch.where(hidden, 0, (s + torch.where(hidden, -math.inf, 0.0)).softmax(-1))
    (w * torch.arange(3)).sum().backward()
    assert w.isfinite().all() and s.grad[0].isfinite().all() and s.grad[1].isnan().all()


def naive_nested_encoder():
    q, hidden, outs = torch.randn(2, 3, 4), torch.tensor([[False] * 3, [True] * 3]), []
    for nested in (True, False):
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=nested
        ).eval()
        with torch.no_grad():
            outs.append(encoder(q, src_key_padding_mask=hidden))
    assert (
        torch.allclose(outs[0][0], outs[1][0], atol=1e-6)
        and not outs[0][1].any()
        and outs[1][1].isnan().all()
    ), "zeros on one road, NaN on the other"


def naive_mean_of_nothing():
    assert is_nan(torch.zeros(3).sum() / torch.zeros(3, dtype=torch.bool).sum())
    with pytest.raises(RuntimeError, match="greater than 0"):
        nn.utils.rnn.pack_padded_sequence(
            torch.randn(2, 3, 4), torch.tensor([3, 0]), batch_first=True, enforce_sorted=False
        )


def naive_loss_of_nobody():
    logits, nobody = torch.randn(4, 3), torch.full((4,), -100)
    value, slope = value_and_slope(lambda x: F.cross_entropy(x, nobody), logits)
    assert math.isnan(value) and not slope.any(), (
        "the logits come away unharmed; a learned weight of the task does not:"
    )
    balance = torch.zeros((), requires_grad=True)
    (torch.exp(-balance) * F.cross_entropy(logits, nobody) + balance).backward()
    assert is_nan(balance.grad)
    assert is_nan(
        F.cross_entropy(logits, torch.zeros(4, dtype=torch.long), weight=torch.tensor([0.0, 1, 1]))
    )
    assert is_nan(F.mse_loss(logits[[]], logits[[]]))


def naive_contrastive():
    def supcon(z, y):
        z, others = F.normalize(z, dim=-1), ~torch.eye(len(y), dtype=torch.bool)
        same, scores = others & (y[:, None] == y), z @ z.T / 0.1
        log_share = scores - scores.masked_fill(~others, -math.inf).logsumexp(1, keepdim=True)
        return -((log_share * same).sum(1) / same.sum(1)).mean()

    z = torch.randn(4, 5)
    value, slope = value_and_slope(lambda v: supcon(v, torch.tensor([0, 0, 1, 2])), z)
    assert math.isnan(value) and slope.isnan().all(), (
        "two anchors without a positive spoil the whole batch"
    )
    assert math.isfinite(value_and_slope(lambda v: supcon(v, torch.tensor([0, 0, 1, 1])), z)[0])
    value, slope = value_and_slope(
        lambda v: F.cross_entropy(F.normalize(v, dim=-1) @ z[:1].T, torch.tensor([0])), z[1:2]
    )
    assert value == 0 and not slope.any(), "InfoNCE on one item: no signal, and nothing says so"


def naive_zero_vector():
    value, slope = value_and_slope(lambda x: (x / x.norm()).sum(), torch.zeros(3))
    assert math.isnan(value) and is_nan(slope)
    value, slope = value_and_slope(lambda x: F.normalize(x, dim=0).sum(), torch.zeros(3))
    assert value == 0 and slope.min() > 1e11, "safe, but its gradient is 1e12"


def naive_logarithm():
    p = torch.tensor([1.0, 0.0])
    value, slope = value_and_slope(lambda x: -(x * x.log()).sum(), p)
    assert math.isnan(value) and is_nan(slope)
    value, slope = value_and_slope(lambda x: torch.special.entr(x).sum(), p)
    assert value == 0 and slope.isinf().any()
    assert (
        torch.tensor(0.0).log() == -math.inf
        and torch.tensor(100.0).exp().isinf()
        and torch.tensor(12.0).half().exp().isinf()
    )


def naive_clipping():
    def clipped(value, **options):
        parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
        for p in parameters:
            p.grad = torch.ones(2)
        parameters[1].grad[0] = value
        nn.utils.clip_grad_norm_(parameters, 1.0, **options)
        return torch.stack([p.grad for p in parameters])

    assert clipped(math.nan).isnan().all(), "one NaN becomes all of them"
    after = clipped(math.inf)
    assert int(after.isnan().sum()) == 1 and int((after == 0).sum()) == 5, (
        "one inf takes every other gradient to 0"
    )
    with pytest.raises(RuntimeError, match="non-finite"):
        clipped(math.inf, error_if_nonfinite=True)


def naive_moments():
    p = nn.Parameter(torch.ones(2))
    optimiser = torch.optim.AdamW([p])
    p.grad = torch.tensor([math.nan, 1.0])
    optimiser.step()
    with torch.no_grad():
        p.fill_(1.0)
    for _ in range(100):
        p.grad = torch.ones(2)
        optimiser.step()
    assert p[0].isnan() and p[1].isfinite() and optimiser.state[p]["exp_avg"][0].isnan()


def naive_running_statistics():
    norm, x = nn.BatchNorm1d(2), torch.randn(8, 2)
    x[0, 0] = math.nan
    norm(x)
    for _ in range(100):
        assert norm(torch.randn(8, 2)).isfinite().all()
    assert norm.running_mean.isnan().tolist() == norm.running_var.isnan().tolist() == [
        True,
        False,
    ] and is_nan(norm.eval()(torch.randn(8, 2)))


def naive_monitor():
    p = nn.Parameter(torch.ones(1))
    optimiser = torch.optim.SGD([p], 1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=1)
    schedule.step(1.0)
    schedule.step(math.nan)
    assert schedule.best == 1.0 and schedule.num_bad_epochs == 1, (
        "this torch counts NaN as no better"
    )
    best = math.inf
    assert not math.nan < best and not math.nan >= best, (
        "'nan < best' never saves, 'not nan >= best' always does"
    )


def naive_schedules():
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def started(make):
        optimiser = torch.optim.SGD([p], 1.0)
        return optimiser, make(optimiser)

    optimiser, one = started(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=3))
    with pytest.raises(ValueError, match="total steps is 3"):
        for _ in range(4):
            optimiser.step()
            one.step()
    for make in (
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=30),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 0.5**e),
    ):
        optimiser, schedule = started(make)
        optimiser.add_param_group({"params": [q], "lr": 1.0})
        optimiser.step()
        with pytest.raises((KeyError, ValueError, IndexError)):
            schedule.step()


def naive_mask_value():
    with pytest.raises(RuntimeError, match="overflow"):
        torch.zeros(2).half().masked_fill(torch.tensor([True, False]), -1e9)
    assert torch.tensor(-1e9).half() == -math.inf
    assert is_nan((torch.full((2,), torch.finfo(torch.half).min).half() * 2).softmax(0)), (
        "the minimum added twice is -inf again"
    )


def naive_iterator():
    before = torch.get_rng_state()
    iter(torch.utils.data.DataLoader(range(4)))
    assert not torch.equal(before, torch.get_rng_state()), (
        "making an iterator draws from the global generator"
    )


def full_disk(at):
    "As if the disk were full after `at` bytes of any file."

    class Full:
        def __enter__(self):
            self.handler, self.limit = (
                signals.signal(signals.SIGXFSZ, signals.SIG_IGN),
                resource.getrlimit(resource.RLIMIT_FSIZE),
            )
            resource.setrlimit(resource.RLIMIT_FSIZE, (at, self.limit[1]))

        def __exit__(self, *_):
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limit)
            signals.signal(signals.SIGXFSZ, self.handler)

    return Full()


def naive_save(tmp_path):
    path, weights = tmp_path / "last.pt", {"w": torch.randn(5000)}
    torch.save(weights, path)
    with full_disk(4096), pytest.raises((RuntimeError, OSError)):
        torch.save(weights, path)
    with pytest.raises((RuntimeError, OSError, EOFError, pickle.UnpicklingError)):
        torch.load(path)


def naive_flipped_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    path, w = tmp_path / "w.safetensors", torch.ones(50)
    save_file({"w": w}, path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1 << 6
    path.write_bytes(data)
    assert not torch.equal(load_file(path)["w"], w), "loads without complaint"
    np.save(tmp_path / "x.npy", np.ones(50))
    data = bytearray((tmp_path / "x.npy").read_bytes())
    data[-3] ^= 1 << 6
    (tmp_path / "x.npy").write_bytes(data)
    assert not np.array_equal(np.load(tmp_path / "x.npy"), np.ones(50))
    save_file({"w": w * math.nan}, path)
    assert is_nan(load_file(path)["w"])


class Bomb:
    "Unpickling this leaves a folder behind."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def naive_unpickling(tmp_path):
    import joblib
    import pandas as pd

    path = tmp_path / "weights"

    def explodes(write, read):
        ran = tmp_path / "ran"
        write(Bomb(ran))
        try:
            read()
        # whatever it says afterwards, the code has run
        except Exception:
            pass
        exploded = ran.exists()
        if exploded:
            ran.rmdir()
        return exploded

    pickled, saved = (
        lambda b: path.write_bytes(pickle.dumps(b)),
        lambda b: torch.save({"w": b}, path),
    )

    def array(b):
        with open(path, "wb") as file:
            np.save(file, np.array([b], dtype=object), allow_pickle=True)

    assert explodes(pickled, lambda: pickle.loads(path.read_bytes())) and explodes(
        pickled, lambda: pd.read_pickle(path)
    )
    assert explodes(lambda b: joblib.dump(b, path), lambda: joblib.load(path)) and explodes(
        saved, lambda: torch.load(path, weights_only=False)
    )
    assert explodes(array, lambda: np.load(path, allow_pickle=True))
    assert not explodes(saved, lambda: torch.load(path)) and not explodes(
        array, lambda: np.load(path)
    ), "the defaults are safe"


def naive_tables(tmp_path):
    import pandas as pd

    path = tmp_path / "t.csv"
    path.write_text("id,text,score,score\n007,NA,1O,inf\n8,None,2,1\n")
    t = pd.read_csv(path)
    assert (
        list(t.columns) == ["id", "text", "score", "score.1"]
        and t["id"].tolist() == [7, 8]
        and t["text"].isna().all()
    )
    assert not pd.api.types.is_numeric_dtype(t["score"]) and t["score.1"].tolist() == [math.inf, 1]


def naive_bomb(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros(3_000_000, np.float32))
    with zipfile.ZipFile(path) as archive:
        size = archive.infolist()[0].file_size
    assert path.stat().st_size < 0.002 * size and np.load(path)["x"].nbytes == 12_000_000, (
        "no complaint"
    )


def naive_archive(tmp_path):
    path, inside = tmp_path / "a.tar", tmp_path / "inside"
    inside.mkdir()
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("../escaped"), io.BytesIO())
    with tarfile.open(path) as archive:
        with pytest.raises(tarfile.OutsideDestinationError):
            archive.extractall(inside, filter="data")
        if sys.version_info < (3, 12):
            archive.extractall(inside)
        else:
            archive.extractall(inside, filter="fully_trusted")
    assert (tmp_path / "escaped").exists()


def naive_metric():
    nan, truth = torch.full((8,), math.nan), torch.randn(8)
    assert ((nan > 0) == (truth > 0)).float().mean() == (truth <= 0).float().mean(), (
        "a model that is NaN has an accuracy"
    )


# --- which test holds which trap

TRAPS = {
    "the root of a zero error": (
        naive_root,
        [
            "test_normalized::test_rmse_at_zero_error_costs_the_root_of_eps_and_pulls_nowhere",
            "test_normalized::test_rmse_of_nobody_is_exactly_nothing",
            "test_batch::test_masked_std_has_a_finite_gradient_on_a_constant",
        ],
    ),
    "an eps that float16 does not have": (
        naive_root_in_float16,
        [
            "test_normalized::test_rmse_computes_in_float32",
            "test_normalized::test_an_eps_that_is_no_help_is_refused",
        ],
    ),
    "the correlation of a constant": (
        naive_correlation,
        [
            "test_objectives::test_ccc",
            "test_objectives::test_ccc_is_the_metric",
            "test_metrics::test_ccc_of_constants_is_zero_on_both_roads",
        ],
    ),
    "BatchNorm of one item": (
        naive_batchnorm_of_one,
        ["test_audiovisual::test_concat_norm_is_its_layers_and_takes_a_lone_item"],
    ),
    "LayerNorm over one feature": (
        naive_layernorm_of_one_feature,
        ["test_normalized::test_constant_rows_and_single_features_give_the_bias"],
    ),
    "sums in float16": (
        naive_sums_in_float16,
        [
            "test_traps::test_means_and_spreads_in_float16",
            "test_traps::test_a_loud_tone_under_float16",
        ],
    ),
    "all keys masked": (
        naive_masked_attention,
        [
            "test_attention::test_where_torch_gives_nan_a_query_without_keys_gets_zero",
            "test_attention::test_the_maps_are_the_weights_that_made_the_answer",
            "test_mult::test_a_query_that_may_look_nowhere_finds_zeros",
            "test_mult::test_maps_come_from_the_pass_that_made_the_prediction",
        ],
    ),
    "a where behind the NaN": (
        naive_where_behind_a_softmax,
        ["test_attention::test_masked_softmax_of_nothing_is_zero_and_silent_in_the_backward_pass"],
    ),
    "the nested-tensor path": (
        naive_nested_encoder,
        [
            "test_mult::test_a_missing_modality",
            "test_mult::test_encoders_side_by_side_are_torchs_one_by_one",
        ],
    ),
    "a mean over nothing": (
        naive_mean_of_nothing,
        [
            "test_batch::test_masked_pooling_is_numpy_over_the_real_steps",
            "test_mult::test_last_state_is_the_lstm_over_each_items_real_steps",
        ],
    ),
    "a loss over nobody": (
        naive_loss_of_nobody,
        [
            "test_objectives::test_cross_entropy_is_torchs_and_survives_no_targets",
            "test_multitask::test_an_absent_class_keeps_the_loss_finite",
            "test_objectives::test_mse_ignores_unknown_targets",
            "test_multitask::test_a_task_without_a_label_costs_exactly_nothing",
        ],
    ),
    "an anchor without a positive": (
        naive_contrastive,
        [
            "test_contrastive::test_nothing_to_compare_costs_exactly_nothing",
            "test_contrastive::test_hard_batches_are_finite",
            "test_contrastive::test_objective_is_the_loss_of_its_head_and_says_who_had_a_positive",
        ],
    ),
    "the direction of a zero vector": (
        naive_zero_vector,
        ["test_contrastive::test_a_vector_of_zeros_gets_no_gradient_and_nan_is_seen"],
    ),
    "log of 0 and exp of much": (
        naive_logarithm,
        [
            "test_audiovisual::test_silence_and_loud_noise_are_finite",
            "test_objectives::test_entropy",
            "test_traps::test_a_clock_has_ends",
            "test_contrastive::test_a_temperature_that_cannot_be_is_refused",
        ],
    ),
    "clipping what is not finite": (
        naive_clipping,
        [
            "test_update::test_a_value_that_is_not_finite_stops_before_the_step",
            "test_update::test_clip_bounds_the_step",
        ],
    ),
    "the optimiser's memory": (
        naive_moments,
        ["test_traps::test_a_bad_update_leaves_nothing_behind"],
    ),
    "BatchNorm's memory": (
        naive_running_statistics,
        ["test_traps::test_a_bad_update_leaves_nothing_behind"],
    ),
    "a monitor that is NaN": (
        naive_monitor,
        ["test_traps::test_a_nan_is_never_the_best", "test_plan::test_plateau_is_torchs"],
    ),
    "schedules past their end, groups added late": (
        naive_schedules,
        [
            "test_plan::test_any_schedule_is_defined_everywhere",
            "test_plan::test_every_parameter_is_in_one_group",
            "test_traps::test_frozen_parameters_have_their_group_from_the_start",
        ],
    ),
    "-1e9 in float16": (
        naive_mask_value,
        [
            "test_attention::test_masked_softmax_is_float32_whatever_comes_in",
            "test_attention::test_large_scores_survive_half_precision",
            "test_mult::test_half_precision_and_shapes_without_numbers",
        ],
    ),
    "an iterator that draws": (
        naive_iterator,
        [
            "test_plan::test_load_gives_the_batches_in_order_and_draws_nothing",
            "test_loop::test_noise_of_the_data_is_resumed",
        ],
    ),
    "a full disk over the last checkpoint": (
        naive_save,
        [
            "test_traps::test_a_full_disk_leaves_the_last_checkpoint",
            "test_checkpoint::test_a_full_disk_leaves_the_previous_loadable",
            "test_loop::test_disk_full_in_the_middle_of_a_run",
        ],
    ),
    "a flipped bit": (
        naive_flipped_bit,
        [
            "test_checkpoint::test_any_damage_is_refused_by_name_and_the_one_before_is_used",
            "test_checkpoint::test_no_flipped_bit_of_a_manifest_passes",
        ],
    ),
    "files that run code": (
        naive_unpickling,
        [
            "test_layout::test_nothing_in_the_package_unpickles",
            "test_bad_inputs::test_bad_input",
            "test_traps::test_calls_that_do_not_occur",
        ],
    ),
    "tables read by guesswork": (
        naive_tables,
        ["test_readers::test_values_stay_what_they_are", "test_bad_inputs::test_bad_input"],
    ),
    "bombs and headers that lie": (
        naive_bomb,
        ["test_bad_inputs::test_bad_input", "test_bad_inputs::test_there_are_many"],
    ),
    "archives that leave their folder": (
        naive_archive,
        ["test_traps::test_calls_that_do_not_occur"],
    ),
    "a metric that hides NaN": (naive_metric, ["test_pitfalls::test_which_metrics_hide_nan"]),
    # traps of engines, whose naive half is another library's: only the guard is tested
    "runs that depend on state": (
        None,
        [
            "test_loop::test_killed_anywhere_and_resumed_it_is_the_same_run",
            "test_loop::test_sigkill",
            "test_loop::test_a_run_depends_on_its_seed_and_nothing_else",
        ],
    ),
    "other threads, other bits": (
        None,
        ["test_loop::test_resume_refuses_another_plan_and_tells_of_another_machine"],
    ),
    "parameters thawed inside a wrapper": (
        None,
        [
            "test_finetune::test_two_processes_average_what_is_thawed",
            "test_finetune::test_killed_around_every_thaw_and_resumed_it_is_the_same_run",
        ],
    ),
    "a log cut by a kill": (
        None,
        [
            "test_history::test_a_log_is_cut_at_its_mark_and_a_changed_one_refused",
            "test_history::test_numbers_survive_the_log_bit_for_bit",
        ],
    ),
    # traps of protocols, whose naive half is measured where they are taught
    "a speaker on both sides, statistics of test speakers, a test set that chooses": (
        None,
        [
            "test_protocols::test_protocol_refuses_a_speaker_on_both_sides",
            "test_protocols"
            "::test_protocol_refuses_statistics_of_test_speakers_unless_it_may_say_so",
            "test_protocols::test_protocol_refuses_the_test_set_as_validation",
            "test_protocols::test_speakers_and_statistics_inflate_as_measured",
            "test_protocols::test_choosing_on_the_test_inflates_as_measured",
            "test_corpora::test_check_split_names_the_leak",
        ],
    ),
    "features that know the labels": (
        None,
        [
            "test_protocols::test_protocol_refuses_features_that_know_the_labels",
            "test_protocols::test_features_that_know_the_labels_inflate_as_measured",
        ],
    ),
    "two processes that train alone": (
        None,
        [
            "test_traps::test_processes_that_would_train_alone_are_refused",
            "test_loop::test_two_processes_give_the_losses_of_one",
        ],
    ),
}


def test_every_trap_has_a_guard_and_every_named_test_exists():
    for trap, (_naive, guards) in TRAPS.items():
        assert guards, trap
        for name in guards:
            file, test = name.split("::")
            assert re.search(rf"^def {test}\(", (HERE / f"{file}.py").read_text(), re.M), (
                f"{trap}: there is no {name}"
            )
    shown = {f for f, _ in TRAPS.values() if f}
    assert shown == {f for name, f in globals().items() if name.startswith("naive_")}, (
        "a naive form that stands for no trap"
    )
    held = {
        n.split("::")[1]
        for _, guards in TRAPS.values()
        for n in guards
        if n.startswith("test_traps::")
    }
    here = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(), re.M))
    assert here - held == {
        "test_every_trap_has_a_guard_and_every_named_test_exists",
        "test_the_naive_form_fails",
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("trap", [t for t, (naive, _) in TRAPS.items() if naive])
def test_the_naive_form_fails(trap, tmp_path):
    naive = TRAPS[trap][0]
    naive(tmp_path) if inspect.signature(naive).parameters else naive()


# --- guards that no other file holds


def test_means_and_spreads_in_float16():
    x, real = torch.full((2, 4000, 1), 90.0).half(), torch.ones(2, 4000, dtype=torch.bool)
    mean = masked_mean(x, real)
    assert mean.dtype == torch.float16 and mean.flatten().tolist() == [90, 90]
    wide = torch.linspace(-300, 300, 9).half().reshape(1, 9, 1)
    spread = masked_std(wide, real[:1, :9])
    assert spread.dtype == torch.float16 and float(spread) == pytest.approx(
        float(wide.float().std(correction=0)), rel=1e-3
    )
    assert (
        value_and_slope(lambda v: masked_std(v, real[:1, :9]).sum(), torch.zeros(1, 9, 1).half())[1]
        .isfinite()
        .all()
    )
    y = torch.randn(3, 5, 2, dtype=torch.double)
    assert (
        torch.equal(masked_mean(y, real[:1, :5].expand(3, 5)), y.mean(1))
        and masked_mean(y, real[:1, :5].expand(3, 5)).dtype == torch.double
    )


def test_a_loud_tone_under_float16():
    wave = 200 * torch.sin(2 * math.pi * 437.5 * torch.arange(4000) / 16_000)[None]
    sound = Stream.of(wave, rate=16_000)
    quiet = LogMel()(sound).x
    with torch.autocast("cpu", torch.float16):
        under = LogMel()(sound).x
    assert under.isfinite().all() and torch.equal(under, quiet)


def test_a_clock_has_ends():
    for log_width in (-200.0, 200.0):
        clock = Clock(2)
        with torch.no_grad():
            clock.log_width.fill_(log_width)
        out = clock(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]]))
        out.sum().backward()
        assert out.isfinite().all() and clock.log_width.grad.isfinite().all()


def network(norm=True):
    torch.manual_seed(0)
    return Multimodal(
        {"audio": Project(3, 8)},
        (ConcatNorm if norm else ConcatFusion)({"audio": 8}, 8, 0.0),
        {"y": RegressionHead(8)},
    )


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_a_bad_update_leaves_nothing_behind(where):
    """After the error weights and buffers are those before the bad update, and a new run on clean
    data is none the worse: nothing remembers.
    """
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 5, 3, generator=g), torch.randn(32, generator=g)
    if where == "input":
        x[29, 2, 1] = math.nan
    data = Batch(
        {"audio": Stream(x, torch.ones(32, 5, dtype=torch.bool), torch.zeros(32, 5))}, {"y": y}
    )
    model, count = network(), [0]

    def objective(output, batch):
        found = mse("y")(output, batch)
        count[0] += 1
        if where == "gradient" and count[0] == 3:
            found["loss"] = (found["loss"] * 0).sqrt() + found["loss"]
        return found

    states = []
    model.register_forward_pre_hook(
        lambda m, _: states.append({k: v.clone() for k, v in m.state_dict().items()})
    )
    with pytest.raises(NonFiniteError):
        fit(model, objective, data, None, Plan(epochs=3, batch_size=8, lr=1e-2), tracking=QUIET)
    assert all(torch.equal(v, states[-1][k]) for k, v in model.state_dict().items()), (
        "not the state before the bad update"
    )
    assert all(v.isfinite().all() for v in model.state_dict().values())
    clean = Batch({"audio": Stream.of(x, rate=1)}, {"y": y})
    assert all(
        math.isfinite(s["loss"])
        for s in fit(
            model, mse("y"), clean, None, Plan(epochs=2, batch_size=8), tracking=QUIET
        ).steps
    )
    with torch.no_grad():
        assert model.eval()(clean).predictions["y"].isfinite().all()


def test_a_nan_is_never_the_best():
    history = History("loss", "min")
    # None is what the log holds for a NaN
    for epoch, value in enumerate([None, 3.0, None, 2.0, None]):
        history.add(
            {"type": "epoch", "epoch": epoch, "step": epoch, "train": {}, "valid": {"loss": value}}
        )
    assert history.best["epoch"] == 3 and history.stale == 1
    assert count_plateaus([3.0, math.nan, math.nan, math.nan], patience=2) == 1, "NaN is no better"


def test_frozen_parameters_have_their_group_from_the_start():
    "Unfreezing must not need a new group, which would break every schedule."
    model = network()
    model.encoders.requires_grad_(False)
    made = parameter_groups(model, Plan())
    assert {id(p) for g in made for p in g["params"]} == {id(p) for p in model.parameters()}
    assert rate_factor(Plan(schedule="onecycle"), 99, 50) == pytest.approx(
        rate_factor(Plan(schedule="onecycle"), 49, 50)
    ), "past its end it stays where it was"


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    w = {"weights": {"w": torch.randn(5000)}}
    save_checkpoint(tmp_path, 1, w, {"step": 1})
    with full_disk(4096), pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(tmp_path, 2, w, {"step": 2})
    layer = nn.Module()
    layer.w = nn.Parameter(torch.zeros(5000))
    load_weights(layer, tmp_path / "step-00000001")
    assert torch.equal(layer.w, w["weights"]["w"]) and [p.name for p in tmp_path.iterdir()] == [
        "step-00000001"
    ]


def test_calls_that_do_not_occur():
    """Calls that run a stranger's code, leave their folder, or resume somewhere else than they
    stopped do not occur in the package at all.
    """
    roads = (
        r"distributed\.checkpoint|register_for_checkpointing|save_state\(|load_state\("
        r"|skip_first_batches|total_limit|prepare_scheduler|prepare_data_loader|unpack_archive"
        r"|extractall|\bdill\b|cloudpickle|joblib\.load|read_pickle|np\.load\(|numpy\.load\("
    )
    paths = sorted((HERE.parent / "mmemo").rglob("*.py"))
    assert len(paths) > 40
    for path in paths:
        found = re.findall(roads, path.read_text())
        assert not found, f"{path.name}: {found}"


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    "What `accelerate launch --cpu` does: two processes asked for, each of them alone."
    import accelerate

    class Alone:
        num_processes, process_index, device = 1, 0, torch.device("cpu")

        def __init__(self, **options):
            pass

    monkeypatch.setattr(accelerate, "Accelerator", Alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = Batch({"audio": Stream.of(torch.zeros(4, 5, 3), rate=1)}, {"y": torch.zeros(4)})
    with pytest.raises(ConfigError, match="2 processes were launched.*torchrun"):
        fit(network(), mse("y"), data, None, Plan(epochs=1), tracking=QUIET)

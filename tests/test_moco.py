"""The encoder, the loss and the method: exact where arithmetic allows, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from runs import settings
from torch import nn

import moco
import sniperface
from moco import IResNet, MarginNCE, MoCo, ProjectionHead


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def small_backbone():
    torch.manual_seed(0)
    return IResNet((1, 1, 1, 1), width=0.125, input_size=32)


def small_moco(guard="shuffle", queue=24, groups=2, **more):
    model = MoCo(small_backbone(), ProjectionHead("none"), MarginNCE(0.2, 0.1), queue, guard, groups, **more)
    model.queue.copy_(unit(queue, 512))
    return model


def views(count=8, seed=1):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def arcface_names(blocks):
    """Names and shapes of the public ArcFace iResNets, written out from their description."""
    norm = {"weight", "bias", "running_mean", "running_var"}
    shapes = {"conv1.weight": (64, 3, 3, 3), "prelu.weight": (64,), "fc.weight": (512, 512 * 49), "fc.bias": (512,)}
    norms = {"bn1": 64, "bn2": 512, "features": 512}
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
        for i in range(count):
            name, before = f"layer{stage}.{i}", width if i else max(64, width // 2)
            shapes |= {f"{name}.conv1.weight": (width, before, 3, 3), f"{name}.conv2.weight": (width, width, 3, 3)}
            shapes |= {f"{name}.prelu.weight": (width,)}
            norms |= {f"{name}.bn1": before, f"{name}.bn2": width, f"{name}.bn3": width}
            if i == 0:
                shapes[f"{name}.downsample.0.weight"] = (width, before, 1, 1)
                norms[f"{name}.downsample.1"] = width
    for name, width in norms.items():
        shapes |= {f"{name}.{part}": (width,) for part in norm} | {f"{name}.num_batches_tracked": ()}
    return shapes


@pytest.mark.parametrize(
    ("blocks", "weights"), [((3, 4, 14, 3), 43_590_848), ((3, 13, 30, 3), 65_156_160)], ids=["iresnet50", "iresnet100"]
)
def test_names_and_shapes_are_those_of_the_public_arcface_weights(blocks, weights):
    with torch.device("meta"):
        model = IResNet(blocks)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == arcface_names(blocks)
    assert sum(p.numel() for p in model.parameters()) == weights


def test_a_view_of_another_size_is_resized_inside_and_the_embedding_has_512_values():
    model = small_backbone().eval()
    large = F.interpolate(views(2), size=112, mode="bilinear")
    assert model(large).shape == (2, 512)
    inside = F.interpolate(large, size=32, mode="bilinear", antialias=True)
    assert torch.equal(model(large), model(inside))


@pytest.mark.parametrize("size", [32, 50, 112])
def test_the_last_layer_fits_any_input_size(size):
    assert IResNet((1, 1, 1, 1), 0.125, size).eval()(torch.zeros(1, 3, size, size)).shape == (1, 512)


def test_the_loss_equals_a_hand_computation():
    q, k, queue, temperature, margin = unit(4, 6, seed=1), unit(4, 6, seed=2), unit(9, 6, seed=3), 0.07, 0.1
    by_hand = []
    for i in range(4):
        positive = math.exp((float(q[i] @ k[i]) - margin) / temperature)
        negatives = sum(math.exp(float(q[i] @ n) / temperature) for n in queue)
        by_hand.append(-math.log(positive / (positive + negatives)))
    assert float(MarginNCE(temperature, margin)(q, k, queue)) == pytest.approx(sum(by_hand) / 4, abs=1e-12)


def test_margin_zero_is_infonce_and_the_sign_of_the_margin_is_kept():
    q, k, queue = unit(4, 6, seed=1), unit(4, 6, seed=2), unit(9, 6, seed=3)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.2
    assert float(MarginNCE(0.2, 0.0)(q, k, queue)) == pytest.approx(
        float(F.cross_entropy(logits, torch.zeros(4).long())), abs=1e-14
    )
    assert MarginNCE(0.2, 0.1)(q, k, queue) > MarginNCE(0.2, 0.0)(q, k, queue) > MarginNCE(0.2, -0.1)(q, k, queue)


@pytest.mark.parametrize(
    ("queue_size", "temperature", "margin", "known"), [(32768, 0.07, 0.1, 11.83), (32768, 0.07, 0.0, 10.40), (64, 0.2, -0.3, None)]
)
def test_a_constant_encoder_has_exactly_the_chance_loss(queue_size, temperature, margin, known):
    one = unit(1, 8)
    loss = MarginNCE(temperature, margin)(one.expand(5, 8), one.expand(5, 8), one.expand(queue_size, 8))
    assert float(loss) == pytest.approx(moco.chance_loss(queue_size, temperature, margin), abs=1e-12)
    if known:
        assert float(loss) == pytest.approx(known, abs=0.005)


def test_with_eman_a_key_does_not_depend_on_who_else_is_in_the_batch():
    model = small_moco("eman").double()
    with torch.no_grad():
        moco.calibrate_batchnorm(model.key, [views(16).double()])
    alone, among = model.encode_keys(views().double()[:2]), model.encode_keys(views().double())[:2]
    assert (alone - among).abs().max() < 1e-6


def test_without_a_guard_it_does():
    model = small_moco("none").double()
    alone, among = model.encode_keys(views().double()[:2]), model.encode_keys(views().double())[:2]
    assert (alone - among).abs().max() > 1e-3


def test_shuffled_sub_batches_come_back_in_order_each_with_its_own_statistics():
    model = small_moco("shuffle", groups=2).double()
    x = views(8).double()
    keys = model.encode_keys(x, torch.Generator().manual_seed(5))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    by_hand = torch.empty_like(keys)  # float32, as the loss takes them
    for rows in order.tensor_split(2):
        by_hand[rows] = F.normalize(model.key(x[rows]).float())
    assert torch.allclose(keys, by_hand, atol=1e-6)
    whole = F.normalize(model.key(x).float())
    assert (keys - whole).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_our_prelu_is_that_of_torch_with_its_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 4, 6, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, :, 0, 0] = 0
    slope, ours = torch.linspace(-0.5, 1.5, 5), moco.PReLU(5)
    ours.weight.data = slope.clone() if dtype == torch.bfloat16 else slope.double()
    found = []
    for function in (ours, lambda x: F.prelu(x, ours.weight.to(x.dtype))):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        ours.weight.grad = None
        y.backward(x.flip(3))
        assert y.is_contiguous(memory_format=torch.channels_last)
        found.append((y, leaf.grad, ours.weight.grad))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize(("batch", "groups"), [(2, 8), (3, 2), (7, 3), (16, 16)])
def test_no_sub_batch_is_too_small_to_be_normalised(batch, groups):
    keys = small_moco("shuffle", groups=groups).encode_keys(views(batch), torch.Generator().manual_seed(0))
    assert torch.isfinite(keys).all()
    assert keys.norm(dim=1).allclose(torch.ones(batch))


def test_a_step_gives_the_loss_of_its_own_figures_and_gradients_reach_the_query_encoder_only():
    model = small_moco("none")
    out = model(views(seed=1), views(seed=2))
    q, k = model.encode_queries(views(seed=1)), out.keys
    assert float(out.loss.detach()) == pytest.approx(float(MarginNCE(0.2, 0.1)(q, k, model.queue)), abs=1e-5)
    assert float(out.pos_sim) == pytest.approx(float((q * k).sum(1).mean()), abs=1e-5)
    negatives = q @ model.queue.T
    assert float(out.neg_sim) == pytest.approx(float(negatives.mean()), abs=1e-5)
    assert float(out.neg_max) == pytest.approx(float(negatives.amax(1).mean()), abs=1e-5)
    assert float(out.instance_top1) == pytest.approx(float(((q * k).sum(1) > negatives.amax(1)).float().mean()), abs=1e-5)
    out.loss.backward()
    assert all(p.grad is not None for p in model.query.parameters() if p.requires_grad)
    assert all(p.grad is None and not p.requires_grad for p in model.key.parameters())


def test_the_symmetric_loss_is_the_mean_of_both_directions_and_enqueues_both_views():
    model = small_moco("none", symmetric=True)
    out = model(views(seed=1), views(seed=2))
    model.symmetric = False
    one, other = model(views(seed=1), views(seed=2)), model(views(seed=2), views(seed=1))
    assert float(out.loss.detach()) == pytest.approx(float((one.loss + other.loss) / 2), abs=1e-4)
    assert out.keys.shape == (16, 512)


def test_logits_and_loss_are_float32_inside_autocast():
    model = small_moco("none")
    with torch.autocast("cpu", torch.bfloat16):
        out = model(views(seed=1), views(seed=2))
        q = model.encode_queries(views(seed=1))
    assert out.loss.dtype == torch.float32
    exact = MarginNCE(0.2, 0.1)(q.double(), out.keys.double(), model.queue.double())
    assert float(out.loss.detach()) == pytest.approx(float(exact), abs=2e-5)


def test_the_queue_holds_the_newest_keys_whatever_the_batch_and_wraps():
    model = small_moco(queue=10)
    model.queue.zero_()
    stream = unit(31, 512, seed=4).float()
    for start in range(0, 31, 4):
        model.enqueue(stream[start : start + 4])
    assert int(model.queue_ptr) == 31 % 10
    newest = {tuple(row.tolist()) for row in stream[-10:]}
    assert {tuple(row.tolist()) for row in model.queue} == newest


def test_the_key_encoder_starts_as_a_copy_head_included_and_follows_by_the_momentum():
    model = MoCo(small_backbone(), ProjectionHead("mlp", 16), MarginNCE(0.2, 0.1), 8)
    pairs = list(zip(model.query.state_dict().values(), model.key.state_dict().values(), strict=True))
    assert all(torch.equal(q, k) for q, k in pairs)
    assert "head.layers.0.weight" in model.key.state_dict()
    with torch.no_grad():
        for p in model.query.parameters():
            p.add_(1.0)
    before = [p.clone() for p in model.key.parameters()]
    model.update_key_encoder(0.9)
    for old, key, query in zip(before, model.key.parameters(), model.query.parameters(), strict=True):
        assert torch.allclose(key, 0.9 * old + 0.1 * query, atol=1e-6)


def test_eman_averages_the_statistics_and_the_others_leave_them():
    for guard in ("eman", "none"):
        model = small_moco(guard)
        with torch.no_grad():
            model.query.backbone.bn1.running_mean.fill_(1.0)
        model.update_key_encoder(0.75)
        assert float(model.key.backbone.bn1.running_mean[0]) == pytest.approx(0.25 if guard == "eman" else 0.0)


def test_calibration_sets_the_statistics_of_all_batches_and_nothing_else():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].running_mean.fill_(7.0)
    batches = [views(4, seed=s) for s in range(3)]
    moco.calibrate_batchnorm(model, batches)
    assert torch.allclose(model[0].running_mean, torch.cat(batches).mean((0, 2, 3)), atol=1e-5)
    assert model[0].momentum == 0.1
    assert torch.equal(model[0].weight, torch.ones(3))


@pytest.mark.parametrize(("progress", "constant", "cosine"), [(0.0, 0.99, 0.99), (0.5, 0.99, 0.995), (1.0, 0.99, 1.0)])
def test_the_key_momentum_is_constant_or_rises_to_one(progress, constant, cosine):
    assert moco.key_momentum_at(progress, 0.99, "constant") == constant
    assert moco.key_momentum_at(progress, 0.99, "cosine") == pytest.approx(cosine)


def test_spread_is_about_one_for_even_rows_and_zero_for_a_collapse():
    assert float(moco.spread_of(unit(4096, 64))) == pytest.approx(1, abs=0.02)
    assert float(moco.spread_of(unit(1, 64).expand(10, 64))) == 0


def test_weight_decay_spares_what_has_one_dimension_and_the_fixed_scale_is_not_trained():
    cfg = settings("backbone=tiny", "moco.queue_size=512")
    model = sniperface.build_model(cfg)
    decayed, free = moco.build_optimizer(model, cfg.train, fused=True).param_groups
    assert decayed["weight_decay"] == 0.0005
    assert free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.query.parameters())) - 1


def test_the_learning_rate_warms_up_and_falls_to_zero_whatever_max_steps():
    cfg = settings("train.lr=0.4", "train.warmup_epochs=2").train
    rates = [moco.lr_at(step, 100, 10, cfg) for step in range(100)]
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[0] == pytest.approx(0.4 / 21)
    assert rates[20] == pytest.approx(0.4)
    assert rates[60] == pytest.approx(0.2)
    assert rates[-1] < 0.001


def test_a_constant_learning_rate_warms_up_and_stays():
    cfg = settings("train.lr=0.4", "train.warmup_epochs=2", "train.lr_schedule=constant").train
    rates = [moco.lr_at(step, 100, 10, cfg) for step in range(100)]
    assert rates[:20] == [moco.lr_at(step, 100, 10, settings("train.lr=0.4", "train.warmup_epochs=2").train) for step in range(20)]
    assert rates[20:] == [0.4] * 80


def test_the_weights_depend_on_the_seed_alone():
    cfg, other = settings("backbone=tiny", "moco.queue_size=512"), settings("backbone=tiny", "moco.queue_size=512", "seed=43")
    torch.manual_seed(1)
    first = sniperface.build_model(cfg).state_dict()
    torch.manual_seed(2)
    second = sniperface.build_model(cfg).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(
        first["query.backbone.conv1.weight"], sniperface.build_model(other).state_dict()["query.backbone.conv1.weight"]
    )

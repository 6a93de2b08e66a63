"""Views: each operation does what its name says, alone and together, beside torchvision where that has it."""

import dataclasses
import math

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TV

import dataio

OPS = [field.name for field in dataclasses.fields(dataio.AugmentConfig) if field.type is dataio.Op or field.type == "Op"]
EVERY_OP = {
    "zoom": (1.0, 1.3), "aspect": (0.9, 1.1), "shift_x": (-0.1, 0.1), "shift_y": (-0.1, 0.1), "rotate": (-20, 20),
    "shear_x": (-0.1, 0.1), "shear_y": (-0.1, 0.1),
    "warp": (0.05, 0.1), "brightness": (0.5, 1.5), "contrast": (0.5, 1.5), "saturation": (0.0, 2.0), "hue": (-0.1, 0.1),
    "grey": (1, 1), "light": (0.2, 0.5), "low_resolution": (0.2, 0.9),
    "blur": (0.5, 2.0), "sharpness": (0.5, 1.9), "posterise": (3, 8), "solarise": (0.1, 0.4), "autocontrast": (1, 1),
    "equalise": (1, 1), "noise": (0.05, 0.1),
    "erase": (0.05, 0.2),
}  # fmt: skip


def recipe(pick=0, flip=0.0, p=1.0, **ops):
    """A recipe in which only the operations named apply, each as (low, high) or as one value."""
    values = {name: dataio.Op(0.0, 0.0, 0.0) for name in OPS}
    for name, limits in ops.items():
        low, high = limits if isinstance(limits, tuple) else (limits, limits)
        values[name] = dataio.Op(p, float(low), float(high))
    return dataio.AugmentConfig(name="test", pick=pick, flip=flip, **values)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def view(images, seed=0, **options):
    return dataio.augment(images, recipe(**options), dataio.draw_numbers(len(images), generator(seed)))


def strengths_of(cfg, count, seed=0):
    """The strength of each operation for `count` images, as `augment` draws them."""
    numbers = dataio.draw_numbers(count, generator(seed)).split([*dataio.NUMBERS.values()], dim=1)
    return dataio.strengths_of(cfg, dict(zip(dataio.NUMBERS, numbers, strict=True)))


@pytest.fixture(scope="module")
def portraits(faces):
    """Eight demo faces as uint8 [8, 3, 112, 112]."""
    rows = pq.read_table(faces / "digi2real_000.parquet")["image_bytes"].to_pylist()[::9][:8]
    return torch.stack([torch.from_numpy(dataio.decode_image(data, 112, 10**6).copy()).permute(2, 0, 1) for data in rows])


def to_bytes(x):
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def levels_apart(x, reference):
    return (to_bytes(x).int() - reference.int()).abs()


def test_every_operation_of_the_recipe_is_tried_here():
    assert sorted(OPS) == sorted(EVERY_OP)


@pytest.mark.parametrize("size", [16, 17, 64, 112])
def test_views_keep_shape_and_range_with_everything_on(size):
    images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8, generator=generator())
    x = view(images, flip=0.5, **EVERY_OP)
    assert x.shape == images.shape
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert x.min() >= -1
    assert x.max() <= 1


def test_the_input_is_not_changed_and_layout_does_not_matter(portraits):
    before = portraits.clone()
    x = view(portraits, flip=0.5, **EVERY_OP)
    assert torch.equal(portraits, before)
    last = view(portraits.to(memory_format=torch.channels_last), flip=0.5, **EVERY_OP)
    assert torch.allclose(x, last, atol=1e-4)


def test_views_are_a_function_of_the_generator(portraits):
    assert torch.equal(view(portraits, 5, flip=0.5, **EVERY_OP), view(portraits, 5, flip=0.5, **EVERY_OP))
    assert not torch.equal(view(portraits, 5, flip=0.5, **EVERY_OP), view(portraits, 6, flip=0.5, **EVERY_OP))


def test_two_views_of_a_picture_are_drawn_apart(portraits):
    one, other = dataio.two_views(portraits, recipe(flip=0.5, **EVERY_OP), generator())
    assert ((one - other).abs().mean(dim=(1, 2, 3)) > 0.01).all()


def test_each_row_of_both_views_is_of_the_picture_of_that_row():
    shades = (torch.arange(64, dtype=torch.uint8) * 4).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    options = recipe(p=0.5, flip=0.5, **{op: EVERY_OP[op] for op in ("low_resolution", "blur", "rotate", "warp")})
    for one in dataio.two_views(shades, options, generator()):
        assert torch.equal(to_bytes(one), shades)


@pytest.mark.parametrize("op", [name for name in OPS if EVERY_OP[name][0] != EVERY_OP[name][1]])
def test_each_image_has_its_own_draw_of_each_operation(portraits, op):
    same = portraits[:1].expand(12, -1, -1, -1)
    x = view(same, **{op: EVERY_OP[op]})
    distinct = {tuple(to_bytes(one).flatten().tolist()) for one in x}
    assert len(distinct) >= {"posterise": 3, "low_resolution": 3, "solarise": 8}.get(op, 12)  # these know few strengths


@pytest.mark.parametrize("op", OPS)
def test_each_operation_applies_to_the_share_of_images_that_p_says(op):
    strengths = strengths_of(recipe(p=0.3, **{op: EVERY_OP[op]}), 4000)
    neutral = dataio.NEUTRAL.get(op, 0.0)
    assert (strengths[op] != neutral).float().mean() == pytest.approx(0.3, abs=0.03)
    applied = strengths[op][strengths[op] != neutral]
    assert EVERY_OP[op][0] - 1e-6 <= applied.min() <= applied.max() <= EVERY_OP[op][1] + 1e-6
    assert applied.mean() == pytest.approx(sum(EVERY_OP[op]) / 2, abs=0.05 * max(1, EVERY_OP[op][1]))
    assert all((strengths[other] == dataio.NEUTRAL.get(other, 0.0)).all() for other in OPS if other != op)


@pytest.mark.parametrize("size", [16, 64, 112])
def test_with_every_p_at_0_the_view_is_the_picture_itself(size):
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator())
    assert (view(images) - dataio.to_float(images)).abs().max() < 3e-5  # 0.004 grey levels: the resampling's rounding
    assert torch.equal(to_bytes(view(images)), images)


def test_pixels_cross_to_minus_one_and_one():
    x = dataio.to_float(torch.tensor([0, 255, 51], dtype=torch.uint8))
    assert torch.allclose(x, torch.tensor([-1, 1, -0.6]))


def test_the_flip_is_an_exact_mirror_of_half_of_the_images(portraits):
    assert torch.equal(to_bytes(view(portraits, flip=1.0)), portraits.flip(3))
    x = to_bytes(view(portraits[:1].expand(200, -1, -1, -1), flip=0.5))
    mirrored = (x == portraits[:1].flip(3)).flatten(1).all(1)
    plain = (x == portraits[:1]).flatten(1).all(1)
    assert (mirrored | plain).all()
    assert 70 < mirrored.sum() < 130


# A picture whose red is x and whose green is y tells where each pixel of the view was taken from.
RAMP_PX = 128


def places_seen(**options) -> torch.Tensor:
    """Where each pixel of a view lies in the picture: [S, S, 2] as (x, y) in [-1, 1]; and a mask of what lies inside."""
    ramp = torch.arange(RAMP_PX, dtype=torch.uint8) * 2
    picture = torch.stack(
        [ramp.expand(RAMP_PX, -1), ramp[:, None].expand(-1, RAMP_PX), torch.zeros(RAMP_PX, RAMP_PX, dtype=torch.uint8)]
    )
    x = view(picture[None], **options)[0, :2]
    return ((x + 1) * 127.5 + 1).permute(1, 2, 0) / RAMP_PX - 1


def axes():
    axis = (torch.arange(RAMP_PX) * 2 + 1) / RAMP_PX - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


TURN = math.radians(30)
GEOMETRY = {
    "shift_x": (0.25, lambda x, y: (x + 0.5, y)), "shift_y": (-0.1, lambda x, y: (x, y - 0.2)),
    "zoom": (2.0, lambda x, y: (x / 2, y / 2)),
    "aspect": (1.21, lambda x, y: (x / 1.1, y * 1.1)), "shear_x": (0.2, lambda x, y: (x + 0.2 * y, y)),
    "shear_y": (0.2, lambda x, y: (x, y + 0.2 * x)),
    "rotate": (30.0, lambda x, y: (x * math.cos(TURN) - y * math.sin(TURN), x * math.sin(TURN) + y * math.cos(TURN))),
}  # fmt: skip


@pytest.mark.parametrize("op", GEOMETRY)
def test_geometry_alone_takes_each_pixel_from_where_it_should(op):
    strength, function = GEOMETRY[op]
    seen, wanted = places_seen(**{op: strength}), torch.stack(function(*axes()), dim=2)
    inside = (wanted.abs() < 1 - 1 / RAMP_PX).all(dim=2)
    assert inside.float().mean() > 0.5
    assert (seen - wanted)[inside].abs().max() < 1e-3


def test_a_shift_by_whole_pixels_moves_the_picture_and_mirrors_the_rest(portraits):
    x = to_bytes(view(portraits, shift_x=0.25))
    assert torch.equal(x[..., :84], portraits[..., 28:])
    assert torch.equal(x[..., 84:], portraits[..., 84:].flip(3))


def test_a_quarter_turn_is_exact(portraits):
    assert torch.equal(to_bytes(view(portraits, rotate=90.0)), torch.rot90(portraits, 1, (2, 3)))
    assert torch.equal(to_bytes(view(portraits, rotate=180.0)), portraits.flip(2, 3))


def test_flip_and_shift_together_mirror_what_the_shift_shows(portraits):
    both = to_bytes(view(portraits, flip=1.0, shift_x=0.25))
    assert torch.equal(both, to_bytes(view(portraits, shift_x=0.25)).flip(3))


def test_a_warp_moves_the_corners_by_up_to_its_share_and_leaves_straight_lines_between_them():
    x, y = axes()
    for seed in range(10):
        seen = places_seen(seed=seed, warp=0.1, zoom=1.5)
        moved = seen - torch.stack([x, y], 2) / 1.5
        corners = moved[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert 0.01 < corners.abs().max() < 0.2 + 1e-3
        assert (seen[0, 1:-1] * 2 - seen[0, :-2] - seen[0, 2:]).abs().max() < 1e-3  # straight along the upper edge
        centre = moved[63:65, 63:65].mean(dim=(0, 1))
        assert (centre - corners.mean(0)).abs().max() < 2e-3


def test_corners_of_the_map_are_where_they_were_sent():
    neutral = strengths_of(recipe(), 1)
    corners = torch.tensor([[[0.1, -0.2, 0.05, 0.3], [0.0, 0.1, -0.1, 0.2]]])
    maps = dataio.geometry(neutral, corners)[0]
    for number, (x, y) in enumerate([(-1, -1), (1, -1), (-1, 1), (1, 1)]):
        assert torch.allclose(maps @ torch.tensor([1.0, x, y, x * y]), torch.tensor([x, y]) + corners[0, :, number], atol=1e-6)


def colours(**options):
    """The colour map [3, 4] of one image with the operations given."""
    return dataio.colour_matrix(strengths_of(recipe(**options), 1))[0]


IDENTITY = torch.eye(3, 4)


@pytest.mark.parametrize("options", [{}, {"brightness": 1.0}, {"contrast": 1.0}, {"saturation": 1.0}, {"hue": 0.0}, {"hue": 1.0}])
def test_neutral_colour_is_the_identity(options):
    assert torch.allclose(colours(**options), IDENTITY, atol=1e-6)


def test_colour_operations_do_what_their_names_say():
    red = torch.tensor([1.0, -1, -1, 1])
    assert torch.allclose(
        colours(brightness=0.5) @ torch.tensor([1.0, -1, 0, 1]), torch.tensor([0.0, -1, -0.5])
    )  # on [0, 1]: 1, 0, 0.5 halved
    assert torch.allclose(colours(contrast=0.5) @ torch.tensor([1.0, -1, 0, 1]), torch.tensor([0.5, -0.5, 0.0]))  # towards mid-grey
    assert torch.allclose(colours(saturation=0.0) @ red, torch.full((3,), 2 * 0.299 - 1), atol=1e-6)
    assert torch.allclose(colours(hue=1 / 3) @ red, torch.tensor([-1.0, 1, -1]), atol=1e-6)  # red to green
    assert torch.allclose(colours(hue=-1 / 3) @ red, torch.tensor([-1.0, -1, 1]), atol=1e-6)
    both = colours(hue=0.1)[:, :3] @ colours(hue=-0.1)[:, :3]
    assert torch.allclose(both, torch.eye(3), atol=1e-6)


TORCHVISION = {
    "brightness": (TV.adjust_brightness, (0.0, 0.4, 1.0, 1.6)),
    "saturation": (TV.adjust_saturation, (0.0, 0.4, 1.0, 1.6)),
    "solarise": (lambda x, threshold: TV.solarize(x, threshold * 255), (0.1, 0.5, 0.9)),
    "blur": (lambda x, sigma: TV.gaussian_blur(x, [13, 13], [sigma, sigma]), (0.5, 1.0, 1.8)),
    "sharpness": (TV.adjust_sharpness, (0.3, 1.0, 1.8)),
}


@pytest.mark.parametrize(
    ("op", "strength"), [(op, strength) for op, (_, strengths) in TORCHVISION.items() for strength in strengths]
)
def test_operations_agree_with_torchvision(portraits, op, strength):
    apart = levels_apart(view(portraits, **{op: strength}), TORCHVISION[op][0](portraits, strength))
    border = 6 if op == "blur" else 0  # where torchvision mirrors, and ours takes the pixels that there are
    assert apart[..., border : 112 - border, border : 112 - border].max() <= 1


def test_blur_keeps_plain_areas_up_to_the_border():
    plain = torch.full((2, 3, 32, 32), 90, dtype=torch.uint8)
    assert torch.equal(to_bytes(view(plain, blur=1.8)), plain)


def test_grey_gives_equal_channels_with_the_usual_weights(portraits):
    x = view(portraits, grey=1.0)
    assert torch.allclose(x[:, 0], x[:, 1], atol=1e-5)
    assert torch.allclose(x[:, 0], x[:, 2], atol=1e-5)
    assert levels_apart(x, TV.rgb_to_grayscale(portraits, 3)).max() <= 1
    x = view(portraits, grey=1.0, saturation=2.0, hue=0.1)
    assert torch.allclose(x[:, 0], x[:, 2], atol=1e-5)


def test_pick_applies_at_most_n_operations_and_all_alike_often():
    limits = {name: (low + 0.01, high + 0.011) for name, (low, high) in EVERY_OP.items()}
    count, n = 6000, 4
    strengths = strengths_of(recipe(pick=n, **limits), count)
    applies = torch.stack([strengths[name] != dataio.NEUTRAL.get(name, 0.0) for name in OPS])
    each = applies.sum(0)
    assert each.max() == n
    assert set(each.tolist()) == {n, n - 1}  # doing nothing is one of them
    assert (each == n - 1).float().mean() == pytest.approx(n / 24, abs=0.02)
    assert applies.float().mean(1).tolist() == pytest.approx([n / 24] * 23, abs=0.02)


def test_pick_never_applies_an_operation_whose_p_is_0():
    few = {name: EVERY_OP[name] for name in ("blur", "noise", "erase")}
    for pick in (1, 2, 3, 4, 5, 20):
        strengths = strengths_of(recipe(pick=pick, **few), 500)
        assert all((strengths[name] == dataio.NEUTRAL.get(name, 0.0)).all() for name in OPS if name not in few)
        applied = sum((strengths[name] != 0).int() for name in few)
        assert applied.max() == min(pick, 3)
        assert applied.min() == min(pick - 1, 3)


def test_pick_of_more_operations_than_there_are_applies_them_all():
    strengths = strengths_of(recipe(pick=30, blur=(1, 2)), 10)
    assert (strengths["blur"] != 0).all()


def all_levels():
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterise_agrees_with_torchvision_on_every_level(bits):
    assert levels_apart(view(all_levels(), posterise=bits), TV.posterize(all_levels(), bits)).max() == 0


def test_autocontrast_agrees_with_torchvision(portraits):
    pale = (portraits.float() * 0.4 + 60).to(torch.uint8)
    assert levels_apart(view(pale, autocontrast=1), TV.autocontrast(pale)).max() <= 1
    plain = torch.full((1, 3, 16, 16), 90, dtype=torch.uint8)
    assert torch.equal(to_bytes(view(plain, autocontrast=1)), plain)


def test_equalise_agrees_with_torchvision_on_pictures_of_many_levels(portraits):
    apart = levels_apart(view(portraits, equalise=1), TV.equalize(portraits))
    assert apart.float().mean() < 4


def test_equalise_keeps_the_order_of_what_another_operation_made_too_bright():
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(1, 3, 64, 64)
    x = view(ramp, brightness=1.4, equalise=1)
    assert (x.diff(dim=3) >= 0).all()


def test_equalise_keeps_a_black_border_black_and_a_plain_picture_as_it_is(portraits):
    half = portraits.clone()
    half[..., :56] = 0
    assert levels_apart(view(half, equalise=1), TV.equalize(half)).float().mean() < 4
    plain = torch.full((1, 3, 16, 16), 90, dtype=torch.uint8)
    assert torch.equal(to_bytes(view(plain, equalise=1)), plain)


def test_low_resolution_keeps_plain_areas_and_takes_detail(portraits):
    plain = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)
    assert torch.equal(to_bytes(view(plain, low_resolution=0.25)), plain)
    fine = torch.tensor([0, 255], dtype=torch.uint8).repeat(32).expand(1, 3, 64, 64)
    assert view(fine, low_resolution=0.25).abs().max() < 0.2
    assert torch.equal(to_bytes(view(portraits, low_resolution=1.0)), portraits)
    detail = [(view(portraits, low_resolution=side) - dataio.to_float(portraits)).abs().mean() for side in (0.25, 0.5, 0.75)]
    assert detail[0] > detail[1] > detail[2] > 0.001


@pytest.mark.parametrize("side", [0.3, 0.47, 0.9])
def test_low_resolution_is_what_interpolation_to_whole_pixels_and_back_gives(portraits, side):
    small = F.interpolate(dataio.to_float(portraits), (round(112 * side),) * 2, mode="bilinear", antialias=True)
    wanted = F.interpolate(small, (112, 112), mode="bilinear")
    assert torch.allclose(view(portraits, low_resolution=side), wanted, atol=1e-4)


def test_what_lies_outside_of_the_picture_is_mirrored(portraits):
    maps = torch.zeros(8, 2, 4)
    maps[:, 0, 1] = maps[:, 1, 2] = 1.3  # x and y of the view, a third wider than the picture
    maps[:, :, 0] = torch.linspace(-1.6, 1.6, 16).view(8, 2)
    axis = (torch.arange(112) * 2 + 1) / 112 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = 1.3 * torch.stack([x, y], dim=-1) + maps[:, None, None, :, 0]
    wanted = F.grid_sample(dataio.to_float(portraits), grid, padding_mode="reflection", align_corners=False)
    assert torch.allclose(dataio.resample(dataio.to_float(portraits), maps), wanted, atol=1e-4)


def test_a_part_of_a_batch_gives_the_same_views_by_itself(portraits):
    cfg, numbers = recipe(p=0.5, flip=0.5, **EVERY_OP), dataio.draw_numbers(40, generator())
    pictures = portraits.repeat(5, 1, 1, 1)
    whole = dataio.augment(pictures, cfg, numbers)
    for rows in (slice(0, 1), slice(3, 20), slice(1, None, 2)):
        assert torch.equal(dataio.augment(pictures[rows], cfg, numbers[rows]), whole[rows])
    longer = dataio.draw_numbers(60, generator())
    assert torch.equal(longer[:40], numbers)


def test_noise_has_the_spread_that_was_asked_for():
    grey = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    x = view(grey, noise=0.1)
    assert x.flatten(1).std(1).tolist() == pytest.approx([0.1] * 4, rel=0.05)
    assert not torch.equal(x[0], x[1])


@pytest.mark.parametrize("area", [0.05, 0.15])
def test_erasing_paints_one_rectangle_of_one_colour_and_about_the_area_asked_for(area):
    grey = torch.full((300, 3, 64, 64), 128, dtype=torch.uint8)
    x = view(grey, erase=area)
    painted = (x - dataio.to_float(grey)).abs().amax(1) > 1e-3  # [300, 64, 64]
    share = painted.float().mean(dim=(1, 2))
    assert share.max() < 1.15 * area
    assert 0.75 * area < share.mean() < 1.02 * area  # some hang over the border
    assert (share > 0).float().mean() > 0.98
    for one, mask in zip(x[:50], painted[:50], strict=True):
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None])
        assert (one[:, mask].std(dim=1) < 1e-5).all()
    some = view(grey[:40], p=0.5, erase=area)
    untouched = (some == dataio.to_float(grey[:40])).flatten(1).all(1)
    assert 8 < untouched.sum() < 32
    colours_seen = {tuple(one[:, mask][:, 0].tolist()) for one, mask in zip(x, painted, strict=True) if mask.any()}
    assert len(colours_seen) > 250

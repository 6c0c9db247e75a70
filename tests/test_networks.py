import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import densenet121, resnet18

from dc_replay import networks
from dc_replay.errors import ArgumentError
from dc_replay.networks import (
    ConvNet,
    DenseNet121,
    FeatureNetwork,
    MatchingNetwork,
    ResNet10,
    convnet_for,
    has_bfloat16,
    resnet_ap10,
    set_precision,
)


def plain(classes):
    """A network that knows nothing of this package."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.ReLU(),
        nn.Linear(6, classes),
    )


def images(count=5, channels=3, height=8, width=8):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("channels", "height", "width", "depth", "features"),
    [
        (3, 32, 32, 3, 8 * 4 * 4),
        (1, 28, 28, 3, 8 * 4 * 4),  # the first convolution pads by 3
        (3, 64, 64, 4, 8 * 4 * 4),
        (1, 8, 8, 1, 8 * 4 * 4),
        (5, 16, 24, 2, 8 * 4 * 6),
        (3, 7, 9, 1, 8 * 3 * 4),
        (3, 28, 32, 2, 8 * 7 * 8),
    ],
)
def test_convnet_halves_the_sides_in_each_layer(channels, height, width, depth, features, device):
    network = ConvNet(6, channels=channels, size=(height, width), width=8, depth=depth).to(device)
    batch = images(2, channels, height, width).to(device)
    assert network.embed(batch).shape == (2, features)
    assert network(batch).shape == (2, 6)
    torch.testing.assert_close(network(batch), network.head(network.embed(batch)))


@pytest.mark.parametrize("factory", [ConvNet, convnet_for((3, 32, 32))], ids=["class", "factory"])
def test_convnet_has_the_published_layers(factory):
    network = factory(10)
    kinds = [type(layer).__name__ for layer in network.layers]
    assert kinds == ["Conv2d", "InstanceNorm", "ReLU", "HalvingPool"] * 3
    assert sum(p.numel() for p in network.parameters()) == 320_010


def test_convnet_pads_images_of_28_pixels_to_32():
    for size, first in ((28, 28), 3), ((28, 30), 1), ((32, 32), 1):
        network = ConvNet(2, size=size, width=2)
        padding = [layer.padding for layer in network.layers[::4]]
        assert padding == [(first, first), (1, 1), (1, 1)]


def test_its_normalisation_is_instance_normalisation():
    network = ConvNet(3, size=(12, 8), width=5, depth=2).double()
    reference = nn.Sequential(
        *[
            nn.InstanceNorm2d(layer.num_channels, affine=True).double()
            if isinstance(layer, nn.GroupNorm)
            else layer
            for layer in network.layers
        ]
    )
    for ours, theirs in zip(network.layers, reference, strict=True):
        if isinstance(ours, nn.GroupNorm):
            nn.init.normal_(ours.weight)
            nn.init.normal_(ours.bias)
            theirs.load_state_dict(ours.state_dict())
    batch = images(4, 3, 12, 8).double()
    torch.testing.assert_close(network.embed(batch), reference(batch).flatten(1))


def test_a_depth_that_leaves_nothing_is_refused():
    with pytest.raises(
        ArgumentError, match="`depth` is 4, but images of 8x12 pixels can be halved"
    ):
        ConvNet(2, size=(8, 12), width=4, depth=4)


@pytest.mark.parametrize(
    ("shape", "depth"),
    [
        ((3, 32, 32), 3),
        ((3, 64, 64), 4),
        ((1, 28, 28), 3),
        ((1, 8, 8), 1),
        ((3, 16, 16), 2),
        ((7, 3, 32, 48), 3),
        ((3, 9, 30), 1),
        ((2, 4, 4), 1),
        ((1, 2, 2), 1),
        ((3, 224, 224), 6),
    ],
)
def test_convnet_for_picks_a_depth_that_fits(shape, depth):
    network = convnet_for(shape, width=4)(5)
    assert sum(isinstance(layer, nn.Conv2d) for layer in network.layers) == depth
    if shape[-1] < 100:
        assert network(torch.zeros(2, *shape[-3:])).shape == (2, 5)


def test_convnet_for_gives_one_factory_for_one_shape():
    assert convnet_for((3, 8, 8), width=4) is convnet_for((3, 8, 8), width=4)
    assert convnet_for((3, 8, 8), width=4) is not convnet_for((3, 8, 8), width=5)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("pool", [False, True])
def test_resnet10_shapes(norm, pool, device):
    network = ResNet10(7, channels=2, width=4, norm=norm, pool=pool).to(device)
    batch = images(2, 2, 16, 24).to(device)
    assert network.embed(batch).shape == (2, 32)
    assert network(batch).shape == (2, 7)
    assert network.layers[:4](batch).shape == (2, 4, 16, 24)
    assert network.layers(batch).shape == (2, 32, 2, 3)
    assert has_kind(network, nn.BatchNorm2d) == (norm == "batch")
    strided = any(m.stride != (1, 1) for m in network.modules() if isinstance(m, nn.Conv2d))
    assert strided != pool


def slow_block(block, images, stride, pool):
    """A basic block layer by layer: strided, or pooled before the second convolution."""
    first, norm, *_, second, last = block.main
    step = {"stride": 1 if pool else stride, "padding": 1}
    found = F.relu(norm(F.conv2d(images, first.weight, **step)))
    if pool and stride > 1:
        found = F.avg_pool2d(found, stride)
    found = last(F.conv2d(found, second.weight, padding=1))
    if stride == 1:
        return F.relu(found + images)
    layer, *_, norm = block.shortcut
    beside = F.conv2d(images, layer.weight, stride=step["stride"])
    return F.relu(found + norm(F.avg_pool2d(beside, stride) if pool else beside))


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("pool", [False, True])
def test_resnet10_equals_its_layers_one_by_one(norm, pool, device):
    network = ResNet10(3, channels=2, width=4, norm=norm, pool=pool).to(device)
    batch = images(3, 2, 16, 24).to(device)
    stem, first, _, *blocks = network.layers
    found = F.relu(first(F.conv2d(batch, stem.weight, padding=1)))
    for block, stride in zip(blocks, (1, 2, 2, 2), strict=True):
        found = slow_block(block, found, stride, pool)
    torch.testing.assert_close(network.embed(batch), found.mean(dim=(2, 3)))


def has_kind(network, kind):
    return any(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel", "before_stages"),
    [
        ((64, 64), 3, (64, 64)),
        ((65, 130), 3, (33, 65)),
        ((128, 200), 3, (64, 100)),
        ((132, 136), 7, (33, 34)),
        ((224, 224), 7, (56, 56)),
    ],
)
def test_the_stem_of_resnet10_shrinks_larger_images(size, kernel, before_stages, pool):
    network = ResNet10(3, size=size, width=2, pool=pool)
    stem = network.layers[:-4]
    batch = images(2, 3, *size)
    found = stem(batch)
    if pool and size[0] % 2:
        before_stages = (before_stages[0] - 1, before_stages[1])
    assert found.shape == (2, 2, *before_stages)
    assert stem[0].kernel_size == (kernel, kernel)
    assert network(batch).shape == (2, 3)
    shrink = size[1] // before_stages[1]
    if pool:
        plain = stem[2](stem[1](F.conv2d(batch, stem[0].weight, padding=kernel // 2)))
        torch.testing.assert_close(found, F.avg_pool2d(plain, shrink))
    else:
        stride = 2 if kernel == 7 else 1
        plain = F.conv2d(batch, stem[0].weight, stride=stride, padding=kernel // 2)
        plain = stem[2](stem[1](plain))
        torch.testing.assert_close(
            found, F.max_pool2d(plain, 3, stride=2, padding=1) if shrink > 1 else plain
        )


def test_resnet_ap10_is_that_of_imagenet_by_default():
    network = resnet_ap10(10)
    assert network.layers[0].weight.shape == (64, 3, 7, 7) and network.head.in_features == 512


def test_resnet10_has_the_published_size_and_initialisation():
    network = ResNet10(100)
    widths = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert sorted(set(widths)) == [32, 64, 128, 256]
    weight = network.layers[-1].main[0].weight
    assert float(weight.detach().std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)


def test_resnet_ap10_pools_and_keeps_no_batch_statistics():
    network = resnet_ap10(4, channels=1, size=(32, 32), width=2)
    assert not has_kind(network, nn.BatchNorm2d) and has_kind(network, nn.AvgPool2d)
    assert network(images(1, 1, 32, 32)).shape == (1, 4)
    assert network.head.in_features == 8 * 2


def test_densenet121_has_a_stem_for_small_images():
    network = DenseNet121(3, channels=1).eval()
    batch = images(1, 1, 32, 32)
    with torch.no_grad():
        assert network.embed(batch).shape == (1, 1024)
        assert network(batch).shape == (1, 3)
        assert network.layers.conv0(batch).shape[-2:] == (32, 32)
        stem = network.layers.relu0(network.layers.norm0(network.layers.conv0(batch)))
        assert network.layers[:4](batch).equal(stem)  # which is not pooled
        expected = network.layers(batch).clamp(min=0).mean(dim=(2, 3))
        torch.testing.assert_close(network.embed(batch), expected)
    assert sum(p.numel() for p in network.head.parameters()) == 3 * 1025
    # torchvision's, whose stem has 7x7 weights of three channels.
    theirs = sum(p.numel() for p in densenet121(num_classes=3).parameters())
    ours = sum(p.numel() for p in network.parameters())
    assert ours == theirs - 64 * 3 * 49 + 64 * 9


@pytest.mark.parametrize(
    "factory",
    [
        plain,
        lambda classes: ConvNet(classes, size=(8, 8), width=4, depth=2),
        lambda classes: ResNet10(classes, width=2, norm="instance"),
    ],
    ids=["plain", "convnet", "resnet10"],
)
def test_matching_networks_yield_logits_and_what_enters_the_last_linear_layer(factory, device):
    batch = images().to(device)
    network = MatchingNetwork(factory, 3, batch)
    parameters = network.fresh()
    logits, features = network(parameters, batch)
    assert logits.shape == (5, 3) and features.shape[0] == 5 and features.ndim == 2

    module = torch.func.replace_all_batch_norm_modules_(factory(3)).to(device)
    module.load_state_dict(parameters)
    entered = []
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    torch.testing.assert_close(logits, module(batch))
    torch.testing.assert_close(features, entered[0])


def test_features_enter_the_last_of_several_fitting_layers_and_are_not_kept():
    def build(classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(192, classes), nn.Linear(classes, classes))

    batch = images()
    network = MatchingNetwork(build, 3, batch)
    parameters = network.fresh()
    logits, features = network(parameters, batch)
    torch.testing.assert_close(logits, features @ parameters["2.weight"].T + parameters["2.bias"])
    assert network._module._taken is None


@pytest.mark.parametrize("side", [32, 64])
def test_a_torchvision_network_can_be_matched_with(side):
    batch = images(2, 3, side, side)
    network = MatchingNetwork(lambda classes: resnet18(num_classes=classes), 4, batch)
    parameters = network.fresh()
    with torch.no_grad():
        logits, features = network(parameters, batch)
    assert logits.shape == (2, 4) and features.shape == (2, 512)
    torch.testing.assert_close(logits, features @ parameters["fc.weight"].T + parameters["fc.bias"])


def test_batch_normalisation_uses_the_batch_alone():
    batch = images(6)
    network = MatchingNetwork(plain, 3, batch)
    parameters = network.fresh()
    first = network(parameters, batch)[0]
    network(parameters, 100 * batch + 3)  # would shift running statistics
    assert torch.equal(network(parameters, batch)[0], first)
    assert not dict(network._module.named_buffers())
    normalised = network._module.network[1](batch[:, :1].expand(-1, 4, -1, -1))
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-6)


def test_matching_networks_drop_out_as_in_training():
    def build(classes):
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, classes))

    network = MatchingNetwork(build, 3, images())
    parameters = network.fresh()
    first, second = (network(parameters, images())[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_fresh_weights_differ_each_time_and_depend_on_nothing(device):
    network = MatchingNetwork(plain, 3, images().to(device))
    first, second = network.fresh(), network.fresh()
    assert list(first) == list(second)
    assert not torch.equal(first["0.weight"], second["0.weight"])
    for value in first.values():
        assert value.device.type == device.type and value.is_leaf and not value.requires_grad
    kept = {name: value.clone() for name, value in second.items()}
    for value in first.values():
        value.zero_()
    assert all(torch.equal(second[name], kept[name]) for name in kept)


def test_weights_go_where_the_function_is_differentiated():
    batch = images(2)
    network = MatchingNetwork(lambda c: ConvNet(c, size=(8, 8), width=2, depth=1), 2, batch)
    parameters = network.fresh()
    slopes = torch.func.grad(lambda p: network(p, batch)[0].sum())(parameters)
    assert set(slopes) == set(parameters)
    assert all(value.any() for name, value in slopes.items() if "norm" not in name)
    assert not any(p.requires_grad for p in network._module.parameters())


def test_names_are_of_weights_with_so_many_dimensions():
    network = MatchingNetwork(plain, 3, images())
    assert network.names([4]) == ["0.weight"]
    assert network.names([2]) == ["5.weight", "7.weight"]
    assert network.names([2, 4]) == ["0.weight", "5.weight", "7.weight"]
    assert network.names([3]) == []


class Unused(nn.Module):
    """Multiplies by its linear layer's weight without calling the layer."""

    def __init__(self, classes):
        super().__init__()
        self.last = nn.Linear(192, classes)

    def forward(self, images):
        return images.flatten(1) @ self.last.weight.T


class Grows:
    """A factory whose networks differ."""

    def __init__(self):
        self.width = 1

    def __call__(self, classes):
        self.width += 1
        return ConvNet(classes, size=(8, 8), width=self.width, depth=1)


class WithFeatures(nn.Module):
    """Returns its logits together with what they were computed from."""

    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(192, classes)

    def forward(self, images):
        features = images.flatten(1)
        return self.head(features), features


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            lambda classes: nn.Sequential(nn.Conv2d(3, classes, 8), nn.Flatten()),
            "no usable features: it must end in a torch.nn.Linear with 3 outputs.*have \\[\\]",
        ),
        (
            lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(192, 10)),
            "must end in a torch.nn.Linear with 3 outputs.*linear layers have \\[10\\]",
        ),
        (
            lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Linear(3, 10)),
            "no usable features: for two images .* yields \\[2, 10\\]",
        ),
        (
            lambda classes: nn.Linear(8, classes),
            "no usable features: for two images .*takes shape \\[2, 3, 8, 8\\]",
        ),
        (
            lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(100, classes)),
            "`network` does not accept images of shape \\[3, 8, 8\\]: ",
        ),
        (
            lambda classes: ConvNet(classes, channels=1, size=(8, 8), width=2, depth=1),
            "`network` does not accept images of shape \\[3, 8, 8\\]: .*build it for this number",
        ),
        (
            lambda classes: WithFeatures(classes),
            "`network` returns a tuple, but must return its logits alone",
        ),
        (lambda classes: torch.relu, "`network` must build a torch.nn.Module .*returned builtin"),
        (lambda classes: None, "`network` must build a torch.nn.Module .*returned NoneType"),
        (Unused, "^`network` has no usable features: its forward pass does not call its last"),
        (Grows(), "^`network` built two networks whose weights differ in name or shape"),
        (
            lambda classes: FeatureNetwork(),
            "does not accept images .*FeatureNetwork must define embed",
        ),
    ],
    ids=[
        "no-linear",
        "outputs",
        "not-last",
        "not-flat",
        "size",
        "channels",
        "several",
        "function",
        "none",
        "unused",
        "differs",
        "abstract",
    ],
)
def test_unusable_networks_are_refused(factory, message):
    with pytest.raises(ArgumentError, match=message):
        MatchingNetwork(factory, 3, images())


class Counting(nn.Module):
    """Keeps a running mean, as batch normalisation does, but is none."""

    def __init__(self, classes):
        super().__init__()
        self.first = nn.Linear(3 * 64, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.head = nn.Linear(8, classes)

    def forward(self, images):
        hidden = self.first(images.flatten(1))
        self.mean.mul_(0.9).add_(0.1 * hidden.mean(dim=0))
        return self.head(hidden - self.mean)


def test_layers_with_state_of_their_own_are_refused():
    with pytest.raises(
        ArgumentError, match="`network` cannot be differentiated by torch.func: .*G"
    ):
        MatchingNetwork(Counting, 3, images())


FUSED = {
    "norm": (networks.InstanceNorm(3), (4, 3, 6, 5)),
    "pool": (networks.HalvingPool(), (4, 3, 6, 4)),
    "odd pool": (networks.HalvingPool(), (2, 3, 7, 5)),
}


@pytest.mark.parametrize(("layer", "shape"), FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_what_is_compiled_computes_what_is_not(layer, shape, mean, device):
    layer = copy.deepcopy(layer).double().to(device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
    batch = mean + torch.rand(shape, dtype=torch.float64, device=device)
    push = torch.rand_like(layer(batch))
    found = []
    for function in (layer, layer.formula):
        value, pull = torch.func.vjp(function, batch)
        _, second = torch.func.jvp(
            lambda x, f=function: torch.func.vjp(f, x)[1](push)[0], (batch,), (batch.cos(),)
        )
        found.append((value, pull(push)[0], second))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(batch), layer.formula(batch))


def test_equal_pixels_are_normalised_to_the_bias():
    norm = networks.InstanceNorm(2)
    for value in (0.0, 1e6):
        assert torch.equal(norm.formula(torch.full((1, 2, 4, 4), value)), torch.zeros(1, 2, 4, 4))


@pytest.fixture
def lowering(monkeypatch):
    """A device that counts as one with bfloat16, whatever this machine has."""
    monkeypatch.setattr(networks, "has_bfloat16", lambda device: True)


@pytest.mark.usefixtures("lowering")
def test_bfloat16_is_close_to_float32_and_can_be_undone(device):
    batch = images(4, 3, 16, 16).to(device)
    network = ConvNet(5, size=(16, 16), width=16, depth=2).to(device)
    names, exact = list(network.state_dict()), network(batch)
    assert set_precision(network, "bfloat16", device) is network
    lower = network(batch)
    assert lower.dtype == torch.float32
    assert list(network.state_dict()) == names
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert not torch.equal(lower, exact)
    torch.testing.assert_close(lower, exact, rtol=0, atol=0.03 * float(exact.detach().abs().max()))
    set_precision(network, "float32", device)
    assert torch.equal(network(batch), exact)


def test_auto_precision_follows_the_hardware(device):
    network = ConvNet(2, size=(8, 8), width=2, depth=1).to(device)
    batch = images().to(device)
    exact = network(batch)
    set_precision(network, "auto", device)
    assert torch.equal(network(batch), exact) != has_bfloat16(device)
    assert not has_bfloat16(torch.device("meta"))


@pytest.mark.usefixtures("lowering")
def test_only_plain_zero_padded_convolutions_are_lowered():
    network = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.Conv2d(3, 2, 3, bias=False)
    )
    kinds = [type(module) for module in network]
    set_precision(network, "bfloat16", torch.device("cpu"))
    assert type(network[0]) is kinds[0] and type(network[1]) is not kinds[1]
    assert network(images()).dtype == torch.float32
    set_precision(network, "float32", torch.device("cpu"))
    assert [type(module) for module in network] == kinds


@pytest.mark.usefixtures("lowering")
def test_matching_networks_take_a_precision():
    batch = images()

    def build(classes):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return ConvNet(classes, size=(8, 8), width=8, depth=1)

    exact, lower = (
        MatchingNetwork(build, 2, batch, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    parameters = exact.fresh()
    assert set(lower.fresh()) == set(parameters)
    first, second = exact(parameters, batch)[0], lower(parameters, batch)[0]
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, rtol=0, atol=0.05 * float(first.abs().max()))


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(networks, "has_bfloat16", lambda device: False)
    with pytest.raises(ArgumentError, match="`precision` is 'bfloat16', which the device 'cpu'"):
        set_precision(nn.Identity(), "bfloat16", torch.device("cpu"))


def test_an_unknown_precision_is_refused():
    with pytest.raises(ArgumentError, match="`precision` is 'float16', but must be 'auto'"):
        set_precision(nn.Identity(), "float16", torch.device("cpu"))
    with pytest.raises(ArgumentError, match="`precision` is 'half'"):
        MatchingNetwork(plain, 3, images(), precision="half")

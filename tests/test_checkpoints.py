"""Checkpoint files: what is read, what is refused, and that nothing in them is ever executed."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import random
import sys
import tarfile
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import damage
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from geofm.checkpoints import read_checkpoint
from geofm.errors import GeofmError, LayoutError, ModelError, UnsafeFileError
from geofm.factory import create_model
from geofm.hub import load_file_weights
from geofm.layouts import LAYOUTS, convert, unwrap
from geofm.models.mpmae import MPMAE

State = dict[str, Tensor]

SMALL: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}


def dense_weights(**arguments: Any) -> State:
    """Every entry of a small MP-MAE different, GRN and biases included; without a head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MPMAE(**(SMALL | arguments))
        return {
            name: torch.randn_like(value)
            for name, value in model.state_dict().items()
            if not name.startswith(("norm.", "head."))
        }


def sparse(dense: State) -> State:
    """The published pretraining layout of a dense encoder, written down from its description."""
    out: State = {}
    for name, value in dense.items():
        module, _, kind = name.rpartition(".")
        if value.ndim == 4 and kind == "weight":
            side = value.shape[-1]
            # Tap t of a kernel counts rows of x before columns of y.
            taps = [value[:, :, y, x] for x in range(side) for y in range(side)]
            depthwise = module == "stem.0" or module.endswith("dwconv")
            out[f"encoder.{module}.kernel"] = torch.stack(
                [tap[:, 0] if depthwise else tap.T for tap in taps]
            )
        elif kind in ("gamma", "beta"):
            out[f"encoder.{name}"] = value.reshape(1, -1)
        elif ".pwconv" in module:
            out[f"encoder.{module}.linear.{kind}"] = value
        elif dense[f"{module}.weight"].ndim == 4:
            out[f"encoder.{name}"] = value.reshape(1, -1)
        else:
            out[f"encoder.{module}.ln.{kind}"] = value
    return out


def published(dense: State) -> dict[str, Any]:
    """What a published MMEarth file holds."""
    rest = {
        "mask_token": torch.zeros(1, 512, 1, 1),
        "proj.weight": torch.zeros(4, 4, 1, 1),
        "decoder_dict.sentinel2.0.grn.gamma": torch.zeros(1, 1, 1, 4),
        "pred_dict.sentinel2.weight": torch.zeros(4, 4, 1, 1),
        "loss_fn.log_vars.sentinel2": torch.zeros(()),
        "layer_norm_tmp.weight": torch.zeros(4),
    }
    return {
        "model": {**sparse(dense), **rest},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 199,
        "scaler": {"scale": 1.0},
        "args": argparse.Namespace(lr=1e-3, output_dir=Path("/results")),
    }


def torch_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_file(content: bytes, name: str = "checkpoint.pth") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write_file


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- what loads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [8, 16])
def test_a_published_mmearth_file_becomes_the_dense_encoder(
    write: Callable[..., Path], patch_size: int
) -> None:
    dense = dense_weights(patch_size=patch_size)
    state, layout = load_file_weights(write(torch_bytes(published(dense))))
    assert layout == "mmearth"
    assert same(state, dense)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_namespace_and_paths_beside_the_weights_are_skipped(
    write: Callable[..., Path], zipped: bool
) -> None:
    content = {
        "model": {"a": torch.arange(3)},
        "args": argparse.Namespace(lr=1.0, nested=argparse.Namespace(x=[1])),
        "path": Path("/a/b"),
    }
    data = torch_bytes(content, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(write(data))
    assert torch.equal(read["model"]["a"], torch.arange(3))
    assert not isinstance(read["args"], argparse.Namespace)


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_both_formats_of_torch_save_are_read(
    write: Callable[..., Path], zipped: bool, protocol: int
) -> None:
    weights = dense_weights()
    data = torch_bytes(weights, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    assert same(read_checkpoint(write(data)), weights)


def test_a_file_written_without_checksums_is_read(write: Callable[..., Path]) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        data = torch_bytes(dense_weights())
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_checkpoint(write(data)), dense_weights())


def test_safetensors_are_read_whatever_their_suffix(write: Callable[..., Path]) -> None:
    weights = dense_weights()
    for name in ("weights.safetensors", "weights.pth"):
        assert same(read_checkpoint(write(save_safetensors(weights), name)), weights)


def test_safetensors_whose_header_length_looks_like_a_web_page_are_read(
    write: Callable[..., Path],
) -> None:
    # A header of 0x3C20 bytes: the file begins with b" <".
    plain = save_safetensors({"a": torch.arange(3.0)})
    length = int.from_bytes(plain[:8], "little")
    padded = plain[8 : 8 + length].ljust(0x3C20)
    data = (0x3C20).to_bytes(8, "little") + padded + plain[8 + length :]
    assert data.lstrip().startswith(b"<")
    assert torch.equal(read_checkpoint(write(data))["a"], torch.arange(3.0))


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_the_state_dict_is_found_under_the_usual_names(
    write: Callable[..., Path], key: str
) -> None:
    dense = dense_weights()
    state, layout = load_file_weights(write(torch_bytes({"epoch": 3, key: dense})))
    assert layout == "native"
    assert same(state, dense)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(write: Callable[..., Path], prefix: str) -> None:
    dense = dense_weights()
    wrapped = {f"{prefix}{name}": value for name, value in dense.items()}
    state, _ = load_file_weights(write(torch_bytes({"state_dict": wrapped})))
    assert same(state, dense)


def test_seco_and_moco_checkpoints_become_a_resnet(write: Callable[..., Path]) -> None:
    names = ("conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer4.2.bn3.running_var")
    resnet = {name: torch.randn(3) for name in names}
    positions = {"conv1": "0", "bn1": "1", "layer1": "4", "layer4": "7"}
    learner = {"encoder_k.x": torch.zeros(1), "heads_q.0": torch.zeros(1), "queue": torch.zeros(1)}
    seco = dict(learner)
    for name, value in resnet.items():
        first, _, rest = name.partition(".")
        seco[f"encoder_q.{positions[first]}.{rest}"] = value
    moco = {f"module.encoder_q.{name}": value for name, value in resnet.items()}
    moco |= {"module.encoder_q.fc.0.weight": torch.zeros(1), "module.queue_ptr": torch.zeros(1)}
    for content, layout in ((seco, "ssl4eco_sequential"), (moco, "ssl4eco_moco")):
        state, found = load_file_weights(write(torch_bytes({"state_dict": content})))
        assert found == layout
        assert same(state, resnet)


# --- nothing is executed ------------------------------------------------------------------------


class Touch:
    """Unpickling it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Evaluate(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


class Custom(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        return Custom, (self.marker,)

    def __setstate__(self, state: Any) -> None:
        self.marker.touch()


FORMATS: dict[str, Callable[[Any], bytes]] = {
    "zip": torch_bytes,
    "zip-protocol-4": lambda content: torch_bytes(content, pickle_protocol=4),
    "legacy": lambda content: torch_bytes(content, _use_new_zipfile_serialization=False),
    **{
        f"pickle-{protocol}": lambda content, protocol=protocol: pickle.dumps(content, protocol)
        for protocol in range(6)
    },
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("kind", "named"),
    [(Touch, "system"), (Evaluate, "eval"), (Custom, "Custom")],
    ids=["system", "eval", "class"],
)
def test_code_in_a_file_is_refused_named_and_not_executed(
    write: Callable[..., Path], tmp_path: Path, form: str, kind: type[Touch], named: str
) -> None:
    marker = tmp_path / "executed"
    path = write(FORMATS[form]({"model": {"a": torch.ones(2)}, "x": kind(marker)}))
    # Torch does not even disassemble protocol 4.
    pattern = "pickle instruction" if form == "zip-protocol-4" else named
    with pytest.raises(UnsafeFileError, match=pattern) as caught:
        read_checkpoint(path)
    assert not marker.exists()
    assert "Nothing was executed" in str(caught.value)
    assert isinstance(caught.value, GeofmError)


def test_the_refused_files_would_have_executed_their_code(tmp_path: Path) -> None:
    # Without this the test above could pass on harmless files.
    for kind in (Touch, Evaluate):
        marker = tmp_path / kind.__name__
        content = pickle.loads(pickle.dumps(kind(marker)))
        if hasattr(content, "close"):
            content.close()
        assert marker.exists()


def test_a_skipped_namespace_smuggles_no_code(write: Callable[..., Path], tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    content = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(x=Touch(marker))}
    for form in ("zip", "legacy"):
        with pytest.raises(UnsafeFileError):
            read_checkpoint(write(FORMATS[form](content)))
    assert not marker.exists()


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound() -> bytes:
    return torch_bytes({"model": {"w": torch.arange(20_000.0)}})


def test_an_empty_file_is_named_as_such(write: Callable[..., Path]) -> None:
    with pytest.raises(LayoutError, match="is empty"):
        read_checkpoint(write(b""))


@pytest.mark.parametrize(
    "page",
    [b"<!DOCTYPE html><html>", b"\n  <html><body>", b"\xef\xbb\xbf<!doctype html>", b"<?xml?>"],
)
def test_a_web_page_is_recognised(write: Callable[..., Path], page: bytes) -> None:
    with pytest.raises(LayoutError, match="web page") as caught:
        read_checkpoint(write(page + b"x" * 1000))
    assert str(caught.value).count("checkpoint.pth") == 1


def test_a_truncated_zip_says_so(write: Callable[..., Path], sound: bytes) -> None:
    for end in (4, 100, len(sound) // 2, len(sound) - 1):
        with pytest.raises(LayoutError, match=r"truncated|damaged"):
            read_checkpoint(write(sound[:end]))


def test_a_hole_in_a_zip_is_damage_though_its_table_of_contents_is_intact(
    write: Callable[..., Path], sound: bytes
) -> None:
    middle = len(sound) // 2
    hole = sound[:middle] + bytes(1000) + sound[middle + 1000 :]
    path = write(hole)
    # Torch alone would load it.
    assert torch.load(path, weights_only=True)["model"]["w"].shape == (20_000,)
    with pytest.raises(LayoutError, match="damaged"):
        read_checkpoint(path)


def test_a_zip_with_a_part_cut_out_is_damage(write: Callable[..., Path], sound: bytes) -> None:
    for start, end in ((1000, 2000), (20_000, 60_000), (10, 20)):
        with pytest.raises(LayoutError, match="damaged"):
            read_checkpoint(write(sound[:start] + sound[end:]))


def test_a_truncated_legacy_file_is_damage(write: Callable[..., Path]) -> None:
    data = FORMATS["legacy"]({"model": {"w": torch.arange(2000.0)}, "args": argparse.Namespace()})
    for end in (1, 5, 14, 20, 100, 200, 300, 400, 500, 1000, len(data) - 1):
        with pytest.raises(LayoutError, match="checkpoint"):
            read_checkpoint(write(data[:end]))


def test_damaged_safetensors_are_refused(write: Callable[..., Path]) -> None:
    data = save_safetensors({"a": torch.arange(1000.0)})
    for broken in (data[:-1], data[:20], data[:9], data[:8] + b"{" * 200 + data[208:]):
        with pytest.raises(LayoutError, match="safetensors"):
            read_checkpoint(write(broken, "a.safetensors"))


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("folder/notes.txt", "hello")
    return buffer.getvalue()


def _torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 4000,
        b"x",
        b".",
        b"hello, this is a text",
        b'{"a": [1, 2]}',
        b"name = 'a card'\n",
        pickle.dumps({"a": 1}),
        _tar(),
        _zip(),
        *(random.Random(seed).randbytes(5000) for seed in range(8)),
    ],
)
def test_other_files_are_no_checkpoints(write: Callable[..., Path], content: bytes) -> None:
    with pytest.raises(LayoutError):
        load_file_weights(write(content))


def test_a_torchscript_archive_is_named_as_such(write: Callable[..., Path]) -> None:
    with pytest.raises(LayoutError, match="torchscript") as caught:
        read_checkpoint(write(_torchscript()))
    assert "state_dict" in str(caught.value)


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {"epoch": 3}, {"model": {}}])
def test_a_file_without_a_state_dict_says_what_it_holds(
    write: Callable[..., Path], content: Any
) -> None:
    with pytest.raises(LayoutError, match="no state dict"):
        load_file_weights(write(torch_bytes(content)))


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_damaged_byte_never_raises_anything_but_our_errors(
    write: Callable[..., Path], form: str
) -> None:
    weights = {"w": torch.arange(50.0)}
    if form == "safetensors":
        sound = save_safetensors(weights)
    else:
        sound = FORMATS[form]({**weights, "args": argparse.Namespace(a=1)})
    chance = random.Random(0)
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(400):
        broken = bytearray(sound)
        for _ in range(chance.choice((1, 1, 3, 10))):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        if chance.random() < 0.3:
            del broken[chance.randrange(len(broken)) :]
        try:
            read = read_checkpoint(write(bytes(broken)))
        except (LayoutError, UnsafeFileError) as error:
            outcomes[type(error).__name__] += 1
        else:
            outcomes["read"] += 1
            if form == "zip":
                # The sums cover every tensor: what is read is what was written.
                assert torch.equal(read["w"], weights["w"])
    assert outcomes["LayoutError"] > 100


# --- layouts ------------------------------------------------------------------------------------


def test_an_unknown_layout_says_what_was_seen_and_what_was_tried(
    write: Callable[..., Path],
) -> None:
    path = write(torch_bytes({"backbone.first": torch.ones(1), "neck.second": torch.ones(1)}))
    with pytest.raises(LayoutError) as caught:
        load_file_weights(path)
    message = str(caught.value)
    assert str(path) in message
    assert "backbone.first" in message
    assert "neck.second" in message
    assert all(name in message for name in LAYOUTS)


def test_another_layout_than_the_stated_one_is_refused(write: Callable[..., Path]) -> None:
    path = write(torch_bytes(published(dense_weights())))
    with pytest.raises(LayoutError, match="tried: native"):
        load_file_weights(path, "native")
    with pytest.raises(LayoutError, match=r"'nonsense'.*mmearth"):
        load_file_weights(path, "nonsense")


def test_an_unknown_entry_of_an_mmearth_file_is_refused() -> None:
    state = unwrap(published(dense_weights())) | {"surprise.weight": torch.ones(1)}
    with pytest.raises(LayoutError, match=r"surprise\.weight"):
        convert(state)


def test_a_kernel_that_is_not_square_is_refused() -> None:
    state = sparse(dense_weights())
    state["encoder.initial_conv.0.kernel"] = state["encoder.initial_conv.0.kernel"][:8]
    with pytest.raises(LayoutError, match=r"initial_conv\.0\.kernel.*\(8, 12, 8\)"):
        convert(state)


# --- strict loading -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def atto() -> State:
    return create_model("mpmae_atto").state_dict()


def _loads(write: Callable[..., Path], state: State, **options: Any) -> nn.Module:
    return create_model("mpmae_atto", pretrained=write(torch_bytes(state)), **options)


def test_an_unchanged_state_dict_loads(write: Callable[..., Path], atto: State) -> None:
    assert same(_loads(write, atto).state_dict(), atto)


def test_a_missing_entry_is_named(write: Callable[..., Path], atto: State) -> None:
    state = {k: v for k, v in atto.items() if k != "stages.2.3.pwconv1.bias"}
    with pytest.raises(LayoutError, match=r"1 missing: stages\.2\.3\.pwconv1\.bias"):
        _loads(write, state)


def test_an_unknown_entry_is_named(write: Callable[..., Path], atto: State) -> None:
    with pytest.raises(LayoutError, match=r"1 unknown: stages\.2\.3\.extra"):
        _loads(write, atto | {"stages.2.3.extra": torch.ones(1)})


def test_a_wrong_shape_is_named_with_both_shapes(write: Callable[..., Path], atto: State) -> None:
    state = atto | {"stages.2.3.pwconv1.bias": torch.ones(7)}
    with pytest.raises(LayoutError, match=r"stages\.2\.3\.pwconv1\.bias is \(7,\), expected \(640"):
        _loads(write, state)


def test_the_weights_of_another_size_name_the_size_they_fit(
    write: Callable[..., Path],
) -> None:
    with pytest.raises(ModelError, match="mpmae_femto"):
        _loads(write, create_model("mpmae_femto").state_dict())


@pytest.mark.parametrize("lost", ["norm.bias", "head.bias"])
def test_a_part_of_a_head_is_refused(write: Callable[..., Path], lost: str) -> None:
    state = dict(create_model("mpmae_atto", num_classes=3).state_dict())
    assert same(_loads(write, state, num_classes=3).state_dict(), state)
    del state[lost]
    with pytest.raises(LayoutError, match=f"missing: {lost}"):
        _loads(write, state, num_classes=3)


def test_a_damaged_local_file_is_no_model(write: Callable[..., Path], atto: State) -> None:
    path = write(torch_bytes(atto))
    damage(path, path.stat().st_size // 2)
    with pytest.raises(LayoutError, match="damaged"):
        create_model("mpmae_atto", pretrained=path)


def test_numpy_numbers_and_lightning_hyperparameters_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "pytorch_lightning.utilities.parsing"
    module = types.ModuleType(name)
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.utilities"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    path = tmp_path / "seco.ckpt"
    torch.save(
        {
            "state_dict": {"w": torch.ones(2)},
            "hyper_parameters": module.AttributeDict(lr=0.03),
            "args": argparse.Namespace(lr=np.float64(0.1)),
            "best": np.float32(0.5),
        },
        path,
    )
    monkeypatch.delitem(sys.modules, name)
    torch.testing.assert_close(read_checkpoint(path)["state_dict"]["w"], torch.ones(2))

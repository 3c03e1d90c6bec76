"""`bn-c image`: a picture as a tensor."""

import json

import numpy as np
import pytest
from command_line import call

import bn_c

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")

PRESETS = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "unit": (0, 1),
    "symmetric": (0.5, 0.5),
}


def normalized(pixels, preset):
    mean, std = PRESETS[preset]
    return ((np.asarray(pixels, np.float64) / 255 - mean) / std).transpose(2, 0, 1)


@pytest.fixture
def picture(tmp_path, rng):
    file = tmp_path / "photo.png"
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(file)
    return file


@pytest.mark.parametrize("preset", PRESETS)
def test_a_picture(picture, preset):
    target = picture.with_name("tensor.npy")
    assert call("image", picture, "-o", target, "--preset", preset) == 0
    tensor = np.load(target)
    assert (tensor.shape, tensor.dtype) == ((3, 40, 60), np.float32)
    assert np.allclose(tensor, normalized(Image.open(picture), preset), rtol=0, atol=1e-6)
    assert sorted(file.name for file in picture.parent.iterdir()) == ["photo.png", "tensor.npy"]


@pytest.mark.parametrize("size", [1, 24, 100])
def test_size_is_a_central_square(picture, size):
    target = picture.with_name("tensor.npy")
    assert call("image", picture, "-o", target, "--preset", "unit", "--size", size) == 0
    square = Image.open(picture).resize((size, size), Image.Resampling.BILINEAR, box=(10, 0, 50, 40))
    tensor = np.load(target)
    assert tensor.shape == (3, size, size)
    assert np.allclose(tensor, normalized(square, "unit"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_way_up(picture, orientation):
    image = Image.open(picture)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(picture, exif=exif)
    target = picture.with_name("tensor.npy")
    assert call("image", picture, "-o", target, "--preset", "unit") == 0
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # as the Exif standard says, by Pillow's transpositions
    upright = image.transpose(turned[orientation]) if orientation > 1 else image
    assert np.allclose(np.load(target), normalized(upright, "unit"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK"])
def test_other_modes_are_rgb(picture, mode):
    image = Image.open(picture).convert(mode)
    image.save(picture.with_suffix(".tiff"))
    target = picture.with_name("tensor.npy")
    assert call("image", picture.with_suffix(".tiff"), "-o", target, "--preset", "unit") == 0
    assert np.allclose(np.load(target), normalized(image.convert("RGB"), "unit"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{picture} -o {folder}/y.npy", "--preset"),
        ("{picture} -o {folder}/y.npy --preset bogus", "invalid choice"),
        ("{picture} -o {folder}/y.npy --preset unit --size 0", "positive"),
        ("{picture} -o {folder}/y.txt --preset unit", "FILE.npy"),
        ("{picture} -o {folder}/no/y.npy --preset unit", "existing folder"),
        ("{picture} -o /proc/y.npy --preset unit", "/proc/y.npy: No such file"),
        ("{folder}/absent.png -o {folder}/y.npy --preset unit", "absent.png: No such file"),
        ("{folder} -o {folder}/y.npy --preset unit", "Is a directory"),
        ("{folder}/cut.png -o {folder}/y.npy --preset unit", "cut.png: "),
        ("{folder}/deep.png -o {folder}/y.npy --preset unit", "expected 8 bits a channel"),
        ("{folder}/text.png -o {folder}/y.npy --preset unit", "text.png: cannot identify"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(picture, capsys, arguments, said):
    folder = picture.parent
    (folder / "cut.png").write_bytes(picture.read_bytes()[:1000])
    (folder / "text.png").write_text("no picture")
    Image.fromarray(np.zeros((3, 3), np.uint16)).save(folder / "deep.png")
    before = sorted(folder.iterdir())
    assert call("image", *(part.format(folder=folder, picture=picture) for part in arguments.split())) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("bn-c image: ")
    assert output.err.count("\n") == 1
    assert said in output.err
    assert sorted(folder.iterdir()) == before


def test_stats_print_what_the_normalizer_takes(picture, capsys):
    assert call("stats", picture) == 0
    found = json.loads(capsys.readouterr().out)
    tensor = bn_c.ImageNormalizer(found["mean"], found["std"], scale=found["scale"])(np.asarray(Image.open(picture)))
    assert np.allclose(tensor.mean((1, 2)), 0, atol=1e-6)
    assert np.allclose(tensor.std((1, 2)), 1, atol=1e-6)
    bn_c.ImageNormalizer(**{name: found[name] for name in ("mean", "std")})

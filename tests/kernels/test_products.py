"""Every kernel gives the product in float64, within what its dtype can say, for any rows."""

from __future__ import annotations

import ctypes
import os
import shutil

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils import cpp_extension

from blt_core.compiling import PassCompiler, load
from blt_core.kernels import native
from blt_core.kernels.candidates import KERNELS, ROW_CLASSES, chosen_from, prepare
from blt_core.nn import Linear, Program, Weights, product
from blt_core.nn.compiled import Sizes
from blt_core.nn.linear import fixed_product
from blt_core.storage.user_cache import alone_with, make_private

CLASSES = {"1": (1, 1), "2-4": (2, 4), "5-16": (5, 16), "more": (17, 40)}
DTYPES = (torch.float32, torch.bfloat16)
#: Rows of float32 beyond which the native kernel gives way to torch's.
MOST_FLOATS = 64


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The native kernel, in a cache folder that the workers of a run share."""
    if not all(shutil.which(tool) for tool in ("c++", "ninja")):
        pytest.skip("no compiler (c++ and ninja): the native kernel is not tried")
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "native"
    cache.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        with alone_with(cache / "build", "builds"):
            if native.load() is None:
                native.build()
        yield native.load()


def drawn(shape, dtype, seed):
    """Numbers of many sizes, zeros among them."""
    made = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=made) * 4.0 ** torch.randint(-4, 4, shape, generator=made)
    return (values * (torch.rand(shape, generator=made) > 0.1)).to(dtype)


def assert_close(found, x, weight):
    """Sums in float32, whatever their order, rounded to the dtype once."""
    wide, weights = x.double(), weight.double()
    want, size = wide @ weights.T, wide.abs() @ weights.abs().T
    assert found.dtype == weight.dtype
    assert found.shape == want.shape
    bound = torch.finfo(weight.dtype).eps * want.abs() + (x.shape[-1] + 2) * 2.0**-23 * size
    assert ((found.double() - want).abs() <= bound + 1e-37).all()


def check_kernel(name, rows_class, data):
    rows = data.draw(st.integers(*CLASSES[rows_class]))
    n, k = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 200))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 2**32))
    weight, x = drawn((n, k), dtype, seed), drawn((rows, k), dtype, seed + 1)
    kernel = KERNELS[name]
    if not kernel.fits(weight, rows):
        return
    assert_close(kernel.prepare(weight)(x), x, weight)
    found = prepare(weight, dict.fromkeys(ROW_CLASSES, name))(x[None], weight)
    assert_close(found[0], x, weight)


@pytest.mark.parametrize("rows_class", CLASSES)
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "native"])
@given(data=st.data())
def test_a_kernel_gives_the_product(name, rows_class, data):
    check_kernel(name, rows_class, data)


@pytest.mark.parametrize("rows_class", CLASSES)
@given(data=st.data())
def test_the_native_kernel_gives_the_product(built, rows_class, data):
    check_kernel("native", rows_class, data)


@given(
    n=st.integers(1, 70),
    k=st.one_of(st.integers(1, 200), st.integers(2040, 2060)),
    rows=st.one_of(st.integers(1, 40), st.integers(60, 70)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_a_native_row_is_the_same_bits_beside_any_rows_on_any_threads(
    built, n, k, rows, dtype, seed
):
    assume(dtype == torch.bfloat16 or rows <= MOST_FLOATS)
    weight, x = drawn((n, k), dtype, seed), drawn((rows, k), dtype, seed + 1)

    def multiply(rows):
        return built(rows, weight)

    together = multiply(x)
    for row in range(rows):
        assert torch.equal(multiply(x[row]), together[row])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(multiply(x), together)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def like_avx512_bf16(tmp_path_factory):
    """The native product as for a CPU with AVX512-BF16, of whose instructions this one has none."""
    if not all(shutil.which(tool) for tool in ("c++", "ninja")):
        pytest.skip("no compiler (c++ and ninja): the native kernel is not tried")
    folder = tmp_path_factory.mktemp("like")
    flags = [*native.FLAGS, "-DBLT_LIKE_AVX512_BF16"]
    options = {"build_directory": str(folder), "is_python_module": False}
    cpp_extension.load("like", [str(native.SOURCES[0])], extra_cflags=flags, **options)
    run = ctypes.CDLL(str(next(folder.glob("like*.so")))).blt_product

    def product(x, weight):
        (rows, k), (n, _) = x.shape, weight.shape
        found = torch.full((rows, n), float("nan"), dtype=weight.dtype)
        at = [ctypes.c_void_p(each.data_ptr()) for each in (x, weight, found)]
        is_half, *sizes = map(ctypes.c_int64, (weight.dtype == torch.bfloat16, rows, k, n))
        run(is_half, *at, *sizes)
        return found

    return product


@given(
    n=st.integers(1, 70),
    k=st.one_of(st.integers(1, 200), st.integers(2040, 2060)),
    rows=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_the_native_kernel_of_another_cpu_gives_the_product(
    like_avx512_bf16, n, k, rows, dtype, seed
):
    weight, x = drawn((n, k), dtype, seed), drawn((rows, k), dtype, seed + 1)
    together = like_avx512_bf16(x, weight)
    assert_close(together, x, weight)
    for row in range(rows):
        assert torch.equal(like_avx512_bf16(x[row : row + 1], weight)[0], together[row])


@pytest.mark.parametrize("rows", [2, 9])
def test_a_native_product_of_what_is_not_finite_is_torchs(built, rows):
    weight = torch.ones(3, 40)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.zeros(rows, 40)
        x[1, 39] = bad
        for dtype in DTYPES:
            own, narrow = weight.to(dtype), x.to(dtype)
            want = fixed_product(narrow, own)
            torch.testing.assert_close(built(narrow, own), want, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [(2, 3, 0), (9, 3, 0), (0, 3, 8), (9, 0, 8)])
def test_a_native_product_of_nothing_is_torchs(built, dtype, rows, n, k):
    x, weight = torch.ones(rows, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    found = built(x, weight)
    assert torch.equal(found, torch.nn.functional.linear(x, weight))


def chosen_linear(name, dtype=torch.float32):
    """A layer whose weight has one kernel for all rows."""
    torch.manual_seed(0)
    layer = Linear(24, 40).to(dtype).requires_grad_(requires_grad=False)
    layer.weight.kernels = prepare(layer.weight, dict.fromkeys(ROW_CLASSES, name))
    return layer


@pytest.mark.parametrize("rows", [1, 3, 9, 33])
def test_a_weight_that_is_written_to_or_moved_is_multiplied_as_it_is_now(rows):
    x = torch.randn(rows, 24)
    for change in (
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.to(torch.float64),
        lambda layer: setattr(layer.weight, "data", layer.weight.data * 3),
    ):
        layer = chosen_linear("columns")
        with torch.no_grad():
            assert_close(layer(x), x, layer.weight)
            change(layer)
            own = x.to(layer.weight.dtype)
            assert_close(layer(own), own, layer.weight)


def test_gradients_autocast_and_other_dtypes_go_by_the_fixed_rule():
    layer = chosen_linear("columns")
    layer.weight.requires_grad_()
    x = torch.randn(3, 24)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_kernel_that_does_not_serve_some_rows_leaves_them_to_the_fixed_rule():
    layer = chosen_linear("mv", torch.bfloat16)
    for rows in (1, 2, 9, 33):
        x = torch.randn(rows, 24).bfloat16()
        with torch.no_grad():
            assert torch.equal(layer(x), fixed_product(x, layer.weight))


def test_the_fixed_rule_comes_first_and_computes_what_it_did():
    weight = torch.randn(8, 16)
    assert chosen_from(weight, 1)[0].name == "linear"
    half = weight.bfloat16()
    assert [chosen_from(half, rows)[0].name for rows in (1, 2, 9)] == ["mv", "linear", "linear"]
    x = torch.randn(1, 1, 16).bfloat16()
    assert torch.equal(product(x, half).flatten(), torch.mv(half, x.flatten()))


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.RunError, match=r"no-such-compiler(.|\n)*fix: install g\+\+"):
        native.build()
    assert native.load() is None
    assert "native" not in [each.name for each in chosen_from(torch.ones(2, 2), 1)]


def test_a_library_that_cannot_be_loaded_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library().parent.mkdir(parents=True)
    native.library().write_bytes(b"of another system")
    assert native.load() is None


def test_rows_of_another_width_or_dtype_are_refused_by_the_native_product(built):
    weight = torch.ones(4, 24)
    for x in (torch.ones(1, 23), torch.ones(1, 48), torch.ones(1, 24, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"expected \(\.\.\., 24\) of Float"):
            built(x, weight)
    with pytest.raises(ValueError, match="expected a contiguous one"):
        built(torch.ones(1, 4), weight.t())
    with pytest.raises(ValueError, match="expected float32 or bfloat16"):
        built(torch.ones(1, 24).double(), weight.double())


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_programs_call_the_native_product_for_the_rows_that_it_is_chosen_for(built, dtype):
    weight = drawn((40, 24), dtype, 0)
    for chosen in ({"1": "native"}, {"5-16": "native"}, dict.fromkeys(ROW_CLASSES, "native"), {}):
        weight.kernels = prepare(weight, chosen)
        layer = Weights.of([weight])
        assert ("blt_core.product" in layer.made) == bool(chosen)
        for rows, rows_class in ((1, "1"), (3, "5-16"), (9, "5-16")):
            x = drawn((rows, 24), dtype, 1)
            open_rows = ({0: torch.export.Dim("rows", min=2)},) if rows > 1 else (None,)
            program = torch.export.export(
                Multiplying(layer), (x,), dynamic_shapes=open_rows, strict=False
            )
            called = [str(node.target) for node in program.graph.nodes]
            assert ("blt_core.product.default" in called) == (rows_class in chosen)
            assert_close(program.module()(x), x, weight)


def test_a_compiled_program_calls_the_native_product_and_is_loaded_anew(built, tmp_path):
    weight = drawn((40, 24), torch.bfloat16, 0)
    weight.kernels = prepare(weight, dict.fromkeys(ROW_CLASSES, "native"))
    layer = Weights.of([weight])

    def multiplied(x, given):
        (own,) = layer.around(iter([given]))
        return (product(x, own),)

    example = Sizes([drawn((3, 24), torch.bfloat16, 1), weight], [{0: "rows"}, {}])
    program = Program("product", multiplied, example, layer.made, (), (False, True))
    make_private(tmp_path / "compiled")
    made = PassCompiler(tmp_path / "compiled", torch.device("cpu"))(program)
    (package,) = (tmp_path / "compiled").glob("product-*.pt2")
    again = load(package, torch.device("cpu"))
    for rows in (2, 9, 70):
        x = drawn((rows, 24), torch.bfloat16, rows)
        for run in (made, again):
            assert torch.equal(run([x, weight])[0], built(x, weight))


class Multiplying(torch.nn.Module):
    """A product with a weight, put in the place of another."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.own = layer, layer.tensors[0]

    def forward(self, x):
        """(…, 24) to (…, 40)."""
        (weight,) = self.layer.around(iter([self.own.clone()]))
        return product(x, weight)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes of files are POSIX's")
@pytest.mark.parametrize("open_to_others", ["file", "folder"])
def test_a_library_that_others_may_write_to_is_not_loaded(
    monkeypatch, tmp_path, capsys, open_to_others
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = native.library()
    path.parent.mkdir(mode=0o700, parents=True)
    path.write_bytes(b"no library")
    path.chmod(0o700)
    (path if open_to_others == "file" else path.parent).chmod(0o777)
    monkeypatch.setattr(native, "_loaded", lambda _: pytest.fail("it was loaded"))
    assert native.load() is None
    assert "others may write to it" in capsys.readouterr().err

"""Every operator against a dense matrix that NumPy builds from its definition, through one contract
test."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curvprune.curvature import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Ekfac,
    Function,
    Kronecker,
    NoClosedForm,
    Operator,
    ParamSpace,
    Sum,
)

RNG = np.random.default_rng(0)
PAIR = ParamSpace(shapes={"a": (2, 2), "b": (3,)})


def symmetric(n: int) -> np.ndarray:
    m = RNG.standard_normal((n, n))
    return (m + m.T) / 2


def moment(n: int) -> np.ndarray:
    m = RNG.standard_normal((n, n + 1))
    return m @ m.T


def orthogonal(n: int) -> np.ndarray:
    return np.linalg.qr(RNG.standard_normal((n, n)))[0]


def tensor(x: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype)


def swapped(dense: np.ndarray, out: int, inp: int) -> np.ndarray:
    """The matrix over vec(W) of [out, in], reordered for a weight that is stored [in, out]."""
    order = np.arange(out * inp).reshape(out, inp).T.ravel()
    return dense[np.ix_(order, order)]


def cases() -> dict[str, tuple[Operator, np.ndarray]]:
    m, g, a, spread = symmetric(7), moment(3), moment(4), RNG.standard_normal(7)
    qg, qa, s = orthogonal(3), orthogonal(4), RNG.random((3, 4))
    ekfac = np.kron(qg, qa) @ np.diag(s.ravel()) @ np.kron(qg, qa).T
    conv = ParamSpace(shapes={"conv": (3, 2, 2, 1)})
    stored = ParamSpace(shapes={"c_fc": (4, 3)})
    blocks = np.zeros((19, 19))
    blocks[:7, :7], blocks[7:, 7:] = m, np.kron(g, a)
    dense, diagonal = Dense(tensor(m), PAIR), Diagonal(tensor(spread), PAIR)
    free = Function(lambda v: tensor(m) @ v, PAIR, dtype=torch.float64)
    kron = Kronecker(tensor(g), tensor(a), conv)
    return {
        "dense": (dense, m),
        "diagonal": (diagonal, np.diag(spread)),
        "kronecker": (kron, np.kron(g, a)),
        "kronecker stored [in, out]": (
            Kronecker(tensor(g), tensor(a), stored, transposed=True),
            swapped(np.kron(g, a), 3, 4),
        ),
        "ekfac": (Ekfac(tensor(qg), tensor(qa), tensor(s)), ekfac),
        "ekfac stored [in, out]": (
            Ekfac(tensor(qg), tensor(qa), tensor(s), stored, transposed=True),
            swapped(ekfac, 3, 4),
        ),
        "block diagonal": (BlockDiagonal({"first": dense, "second": kron}), blocks),
        "function": (free, m),
        "sum": (2.0 * dense - diagonal, 2 * m - np.diag(spread)),
        "sum with a function": (dense + free * 0.5, 1.5 * m),
        "damped": (diagonal.damped(0.3), np.diag(spread) + 0.3 * np.eye(7)),
        "scaled sum of damped": (
            (dense.damped(1.0) + diagonal) * -2.0,
            -2 * (m + np.eye(7) + np.diag(spread)),
        ),
        "function of one number": (
            Function(lambda v: 3 * v, ParamSpace(shapes={"x": ()}), dtype=torch.float64),
            np.array([[3.0]]),
        ),
    }


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_an_operator_keeps_its_contract(name: str) -> None:
    op, dense = CASES[name]
    n = len(dense)
    v, block = RNG.standard_normal(n), RNG.standard_normal((n, 5))
    assert op.space.dim == n
    np.testing.assert_allclose((op @ tensor(v)).numpy(), dense @ v, atol=1e-12)
    np.testing.assert_allclose((op @ tensor(block)).numpy(), dense @ block, atol=1e-12)
    assert (op @ tensor(block[:, :0])).shape == (n, 0)
    np.testing.assert_allclose(float(op.quad(tensor(v))), v @ dense @ v, atol=1e-11)
    np.testing.assert_allclose(
        op.quad(tensor(block)).numpy(), np.diag(block.T @ dense @ block), atol=1e-11
    )
    # a column of a larger block is not contiguous
    np.testing.assert_allclose((op @ tensor(block)[:, 2]).numpy(), dense @ block[:, 2], atol=1e-12)

    np.testing.assert_allclose(op.to_dense().numpy(), dense, atol=1e-12)
    np.testing.assert_allclose(op.to_dense().numpy(), op.to_dense().numpy().T, atol=1e-12)
    if "function" in name:
        with pytest.raises(NoClosedForm, match=r"estimators\.diagonal"):
            op.diagonal()
        with pytest.raises(NoClosedForm, match=r"estimators\.trace"):
            op.trace()
    else:
        np.testing.assert_allclose(op.diagonal().numpy(), np.diag(dense), atol=1e-12)
        assert op.trace() == pytest.approx(np.trace(dense), abs=1e-11)

    for parameter in op.space.shapes:
        part = op.restrict([parameter])
        where = op.space.slices[parameter]
        assert part.space.shapes == {parameter: op.space.shapes[parameter]}
        np.testing.assert_allclose(part.to_dense().numpy(), dense[where, where], atol=1e-12)
        assert (part.measure, part.psd, part.dtype) == (op.measure, op.psd or part.psd, op.dtype)
    assert op.restrict(op.space.shapes) is op
    with pytest.raises(ValueError, match="'nowhere' is not in this space"):
        op.restrict(["nowhere"])

    np.testing.assert_allclose(
        (op.damped(0.7) @ tensor(v)).numpy(), dense @ v + 0.7 * v, atol=1e-12
    )
    np.testing.assert_allclose((-op @ tensor(v)).numpy(), -dense @ v, atol=1e-12)
    if op.psd:
        assert np.linalg.eigvalsh(dense).min() >= -1e-12
    # to 3 and not 0: a damping that leaves it singular is another test's matter
    if not any(word in name for word in ("sum", "function")):
        damping = 3 + np.abs(dense).sum()
        solved = op.damped(damping).solve(tensor(block)).numpy()
        np.testing.assert_allclose(
            solved, np.linalg.solve(dense + damping * np.eye(n), block), atol=1e-12
        )

    exported = op.to_scipy()
    assert exported.shape == (n, n) and exported.dtype == np.float64
    np.testing.assert_allclose(exported.matvec(v), dense @ v, atol=1e-12)
    np.testing.assert_allclose(exported.rmatvec(v), dense @ v, atol=1e-12)
    np.testing.assert_allclose(exported.matmat(block), dense @ block, atol=1e-12)

    with pytest.raises(ValueError, match=rf"takes \({n},\) or \({n}, k\), got \({n + 1},\)"):
        op @ torch.zeros(n + 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"takes torch\.float64, got torch\.float32"):
        op @ torch.zeros(n)
    assert f"n={n}" in repr(op)


def test_restricting_a_block_diagonal_splits_its_blocks() -> None:
    op, dense = CASES["block diagonal"]
    part = op.restrict(["conv", "b"])
    assert list(part.space.shapes) == ["b", "conv"]  # the order of the space, not of the request
    assert isinstance(part, BlockDiagonal)
    np.testing.assert_allclose(part.to_dense().numpy(), dense[4:, 4:], atol=1e-12)
    first = op.restrict(["a"])
    assert isinstance(first, BlockDiagonal)
    assert first.trace() == pytest.approx(np.trace(dense[:4, :4]))


def test_what_is_known_to_be_psd() -> None:
    positive = Diagonal(torch.ones(3))
    negative = Diagonal(-torch.ones(3))
    assert positive.psd and not negative.psd
    assert (positive * 2.0).psd and not (positive * -1.0).psd
    assert positive.damped(0.1).psd and not positive.damped(-0.1).psd
    assert not (positive + negative).psd and not (positive - positive).psd
    elsewhere = Diagonal(-torch.ones(2), ParamSpace(shapes={"y": (2,)}))
    assert not BlockDiagonal({"p": positive, "n": elsewhere}).psd


def test_sums_are_flat_and_solve_through_their_only_part() -> None:
    m = moment(4)
    op = (Dense(tensor(m)) * 2.0).damped(0.5) * 3.0
    assert isinstance(op, Sum) and len(op.parts) == 1 and op.shift == 1.5
    v = RNG.standard_normal(4)
    np.testing.assert_allclose(
        op.solve(tensor(v)).numpy(), np.linalg.solve(6 * m + 1.5 * np.eye(4), v), atol=1e-12
    )
    with pytest.raises(NoClosedForm, match="iterative"):
        (op + op).solve(tensor(v))
    with pytest.raises(ValueError, match=r"singular to working precision.*damped"):
        Diagonal(torch.tensor([1.0, 0.0])).solve(torch.ones(2))


def test_float32_stays_float32() -> None:
    g, a = moment(3), moment(2)
    op = Kronecker(tensor(g, torch.float32), tensor(a, torch.float32))
    v = RNG.standard_normal(6)
    product = op @ tensor(v, torch.float32)
    assert product.dtype == torch.float32
    np.testing.assert_allclose(product.numpy(), np.kron(g, a) @ v, rtol=1e-4, atol=1e-4)
    assert op.to_scipy().matvec(v).dtype == np.float64


def test_a_space_flattens_and_splits() -> None:
    space = ParamSpace(shapes={"w": (2, 3), "s": (), "b": (2,)})
    assert space.dim == 9 and space.slices == {"w": slice(0, 6), "s": slice(6, 7), "b": slice(7, 9)}
    w, s, b = torch.arange(6.0).reshape(2, 3), torch.tensor(6.0), torch.tensor([7.0, 8.0])
    flat = space.flatten({"b": b, "w": w, "s": s})
    assert flat.tolist() == list(range(9))
    parts = space.split(flat)
    assert torch.equal(parts["w"], w) and torch.equal(parts["s"], s) and torch.equal(parts["b"], b)
    parts["b"][0] = -1  # views
    assert flat[7] == -1
    block = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    pieces = space.split(block)
    assert pieces["w"].shape == (2, 3, 4) and pieces["s"].shape == (4,)
    assert torch.equal(pieces["w"][1, 2], block[5]) and torch.equal(space.flatten(pieces), block)
    assert list(space.restrict(["b", "w"]).shapes) == ["w", "b"]


def test_spaces_say_what_does_not_fit() -> None:
    space = ParamSpace(shapes={"w": (2, 3), "b": (2,)})
    with pytest.raises(
        ValueError, match=r"'w': expected shape \(2, 3\) or \(2, 3, 'k'\), got \(3, 2\)"
    ):
        space.flatten({"w": torch.zeros(3, 2), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="no tensor for parameter 'b'"):
        space.flatten({"w": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="'c' is not in this space"):
        space.flatten({"w": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(1)})
    with pytest.raises(ValueError, match="do not agree on the number of vectors"):
        space.flatten({"w": torch.zeros(2, 3, 4), "b": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match=r"expected a vector \(8,\)"):
        space.split(torch.zeros(7))


def test_operators_say_what_does_not_fit() -> None:
    eye = torch.eye(3)
    with pytest.raises(ValueError, match="not symmetric"):
        Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="square"):
        Dense(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="dimension 7"):
        Dense(eye, PAIR)
    with pytest.raises(ValueError, match="not orthogonal"):
        Ekfac(2 * eye, eye, torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"eigenvalues: expected \(3, 3\)"):
        Ekfac(eye, eye, torch.ones(3, 2))
    with pytest.raises(ValueError, match="transposed=True"):
        Kronecker(eye, torch.eye(4), ParamSpace(shapes={"w": (4, 3)}))
    with pytest.raises(ValueError, match=r"one parameter with 3·4 elements"):
        Kronecker(eye, torch.eye(4), PAIR)
    with pytest.raises(ValueError, match=r"float32.*float64"):
        Kronecker(eye, torch.eye(4).double())
    with pytest.raises(ValueError, match="'x' is already in another block"):
        BlockDiagonal({"one": Dense(eye), "two": Dense(eye)})
    with pytest.raises(ValueError, match="different spaces"):
        Dense(torch.eye(7)) + Dense(torch.eye(7), PAIR)
    with pytest.raises(ValueError, match="differ in unit"):
        Dense(eye) + Dense(eye, measure="bits")
    with pytest.raises(ValueError, match=r"must return \(3, 1\)"):
        Function(lambda v: v[:2], ParamSpace(shapes={"x": (3,)})) @ torch.zeros(3)
    with pytest.raises(ValueError, match="limit is 20000"):
        Diagonal(torch.ones(20_001)).to_dense()


def test_spaces_that_differ_only_in_order_do_not_add() -> None:
    one = Diagonal(torch.ones(3), ParamSpace(shapes={"a": (1,), "b": (2,)}))
    other = Diagonal(torch.ones(3), ParamSpace(shapes={"b": (2,), "a": (1,)}))
    with pytest.raises(ValueError, match="different spaces"):
        one + other


# ----------------------------------------------------------------------------------------- inverses


@pytest.mark.parametrize("name", cases())
def test_inverses_are_those_of_the_dense_matrix(name: str) -> None:
    """In closed form where there is one, and by conjugate gradients from products alone."""
    operator, matrix = cases()[name]
    damping = 0.5 + max(0.0, -float(np.linalg.eigvalsh(matrix)[0]))
    expected = np.linalg.inv(matrix + damping * np.eye(len(matrix)))
    products = 0

    def product(v: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        return operator @ v

    free = Function(product, operator.space, dtype=operator.dtype)
    v = tensor(RNG.standard_normal((len(matrix), 3)))
    v[:, 1] = 0  # nothing to solve for
    for given in (operator, free):
        inverse = given.inverse(damping, tol=1e-10)
        np.testing.assert_allclose((inverse @ v).numpy(), expected @ v.numpy(), atol=1e-7)
        np.testing.assert_allclose(
            (inverse @ v[:, 0]).numpy(), expected @ v[:, 0].numpy(), atol=1e-7
        )
        back = inverse.solve(inverse @ v)
        np.testing.assert_allclose(back.numpy(), v.numpy(), atol=1e-7)
    assert 0 < products <= 4 * len(matrix) + 8


def test_inverses_say_what_they_cannot_do() -> None:
    m = tensor(np.diag([-2.0, 1.0, 3.0]))
    free = Function(lambda v: m @ v, ParamSpace(shapes={"x": (3,)}), dtype=torch.float64)
    v = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="curves down"):
        free.inverse(0.5) @ v
    np.testing.assert_allclose((free.inverse(2.5) @ v).numpy(), [2.0, 1 / 3.5, 1 / 5.5])
    with pytest.raises(ValueError, match=r"after 1 products the relative residual is .* raise"):
        free.inverse(2.5, max_products=1) @ v
    with pytest.raises(ValueError, match="damping=-1"):
        free.inverse(-1.0)
    with pytest.raises(NoClosedForm, match=r"iterative solver op.inverse\(damping\)"):
        free.solve(v)
    broken = Function(lambda v: v * float("nan"), free.space, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="not finite"):
        broken.inverse(1.0) @ v

"""Share of the floor: operations that cannot be avoided, at the measured rate of the machine.

floor = operations counted × measured seconds per operation; share = floor / measured time.
"""

from __future__ import annotations

from common import Column, Part, Row, figure1_problem, fresh, problem, timed, warm_seconds

NOTES = """
Share: operations counted, at the rate measured here, over the time measured here.

simulate: an iteration of the pre-training needs the products X·W and Xᵀ·(…), 4·N·T·D·P
operations; rate: these two products alone, same shapes and precision.  Compiled: operations that
XLA counts in the loss and its gradient, elementwise ones included.

predict: one pass, that is the loss of stage two and its gradient in the T coordinates of w, once
per node, operations as XLA counts them; rates: multiply-adds and exponentials on vectors in
cache.  Passes: time over floor, how many such passes the time would pay for.
"""
COLUMNS = (
    Column("case", "case"),
    Column("counted_gflop", "counted Gflop", ".4f"),
    Column("compiled_gflop", "compiled Gflop", ".4f"),
    Column("exponentials", "exponentials"),
    Column("rate_gflops", "Gflop/s", ".1f"),
    Column("rate_gexp", "Gexp/s", ".2f"),
    Column("floor_s", "floor s", ".5f"),
    Column("measured_s", "measured s", ".5f"),
    Column("share", "share", ".1%"),
    Column("passes", "passes", ".0f"),
)


def simulation(dim: int, dtype: str) -> Row:
    """One iteration of the pre-training descent; to be called in a fresh process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lora_theory.simulation.data import run_key
    from lora_theory.simulation.minimise import minimise, training_loss
    from lora_theory.simulation.pretraining import pretraining_data, pretraining_task
    from lora_theory.simulation.sizes import Sizes

    asked, kind = figure1_problem(), np.dtype(dtype).type
    with jax.enable_x64(True):
        data = pretraining_data(run_key(0, 0), asked, Sizes.of(asked, dim), kind)
        task = pretraining_task(data, asked)
        rows, columns = data.sequences.reshape(-1, dim), data.start.shape[1]

        @jax.jit
        def products(weights):
            forward = jnp.matmul(rows, weights, precision="highest")
            return jnp.matmul(rows.T, forward, precision="highest")

        def descent():
            minimum = minimise(task, data.start, 1e-3, 60, activation=asked.activation)
            return minimum.iterations.block_until_ready()

        loss = jax.value_and_grad(lambda w: training_loss(task, w, asked.activation))
        products_s = warm_seconds(lambda: products(data.start).block_until_ready())
        iterations, descent_s = int(descent()), warm_seconds(descent)
        compiled = operations(loss, data.start)["flops"]
    counted = 4.0 * rows.size * columns
    return {
        "case": f"simulate D={dim} {dtype}, per iteration",
        "counted_gflop": counted / 1e9,
        "compiled_gflop": compiled / 1e9,
        "rate_gflops": counted / products_s / 1e9,
        "floor_s": products_s,
        "measured_s": descent_s / iterations,
        "share": products_s * iterations / descent_s,
    }


def theory(tokens: int, nodes: int, blocks: int) -> Row:
    """A warm prediction against one pass over its nodes; to be called in a fresh process."""
    import jax
    import jax.numpy as jnp

    from lora_theory import predict
    from lora_theory.attention import attention

    predict(problem(tokens, penalty=0.05), nodes=nodes, blocks=blocks)
    other = problem(tokens, penalty=0.06)
    measured_s, _ = timed(lambda: predict(other, nodes=nodes, blocks=blocks))
    count = 2 * nodes * blocks  # every node is used with its mirror image
    with jax.enable_x64(True):

        def loss(chi, fields, labels):
            student = attention(fields + chi[:, None] * chi[None], "softmax", row_axis=0)
            return jnp.sum((labels - student) ** 2)

        squares = jnp.ones((tokens, tokens, count))
        needed = operations(jax.value_and_grad(loss), jnp.ones((tokens, count)), squares, squares)
        flops, exponentials = elementwise_rates()
    floor_s = needed["flops"] / flops + needed["transcendentals"] / exponentials
    return {
        "case": f"predict softmax T={tokens}, {blocks} × {nodes} nodes",
        "counted_gflop": needed["flops"] / 1e9,
        "exponentials": int(needed["transcendentals"]),
        "rate_gflops": flops / 1e9,
        "rate_gexp": exponentials / 1e9,
        "floor_s": floor_s,
        "measured_s": measured_s,
        "share": floor_s / measured_s,
        "passes": measured_s / floor_s,
    }


def operations(function, *arguments) -> dict[str, float]:
    """``flops`` and ``transcendentals`` of one call as XLA counts them (a loop's body once)."""
    import jax

    counted = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return {name: float(counted.get(name, 0.0)) for name in ("flops", "transcendentals")}


def elementwise_rates() -> tuple[float, float]:
    """Multiply-add operations and exponentials per second on float64 vectors, all threads."""
    import jax
    import jax.numpy as jnp

    count, repeats = 2**15, 64  # 256 KiB: stays in cache

    @jax.jit
    def multiply_add(x):
        for _ in range(repeats):
            x = 0.999 * x + 1e-3
        return x

    @jax.jit
    def exponential(x):
        for _ in range(repeats):
            x = jnp.exp(-x)
        return x

    x = jnp.linspace(0.0, 1.0, count)
    steps = 2 * count * repeats, count * repeats
    add_s, exponential_s = (
        warm_seconds(lambda f=f: f(x).block_until_ready()) for f in (multiply_add, exponential)
    )
    return steps[0] / add_s, steps[1] / exponential_s


def measure(toy: bool = False) -> Part:
    if toy:
        return Part(NOTES, COLUMNS, [fresh("floor.simulation", dim=8, dtype="float64")])
    rows = [
        fresh("floor.simulation", dim=dim, dtype=dtype)
        for dim in (50, 100, 150)
        for dtype in ("float32", "float64")
    ]
    rows += [fresh("floor.theory", tokens=tokens, nodes=1024, blocks=8) for tokens in (2, 3)]
    return Part(NOTES, COLUMNS, rows)

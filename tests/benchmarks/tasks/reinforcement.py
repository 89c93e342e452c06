"""Tasks of learning from rewards: by policy gradients, by values, from preferences."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tasks.task import Task, dense, dense_init, normal, squared_error

LENGTH, EPISODES = 40, 16


def log_chance(logits, action) -> jax.Array:
    """Of the actions that were taken."""
    logs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logs, action[..., None], axis=-1)[..., 0]


def entropy(logits) -> jax.Array:
    logs = jax.nn.log_softmax(logits)
    return -(jnp.exp(logs) * logs).sum(-1)


def refreshed(every: int) -> Callable:
    """Copies the parameters each `every` steps; the batch knows the `step`."""

    def follow(extra, params, batch):
        is_time = (batch["step"] + 1) % every == 0
        return jax.tree.map(lambda *pair: jnp.where(is_time, *pair), params, extra)

    return follow


def own_copy(params):
    return params


# A pole on a cart.


def cartpole(state, push) -> jax.Array:
    """The next position, velocity, angle and angular velocity; `push` is -1 or 1."""
    _, velocity, angle, spin = jnp.moveaxis(state, -1, 0)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    forced = (10 * push + 0.05 * jnp.square(spin) * sin) / 1.1
    turning = (9.8 * sin - cos * forced) / (2 / 3 - 0.05 * jnp.square(cos) / 1.1)
    speeding = forced - 0.05 * turning * cos / 1.1
    return state + 0.03 * jnp.stack([velocity, speeding, spin, turning], axis=-1)


def play(key, policy):
    """Episodes: `[LENGTH, EPISODES]` of state, action, reward, `is_up` before it."""
    keys = jax.random.split(key)
    noise = jax.random.gumbel(keys[0], (LENGTH, EPISODES, 2))

    def move(carry, noise):
        state, is_up = carry
        action = jnp.argmax(dense(policy, state, jnp.tanh) + noise, axis=-1)
        after = cartpole(state, 2.0 * action - 1)
        is_up_after = is_up & (jnp.abs(after[:, 2]) < 0.2)
        reward = is_up_after * (1 - jnp.square(after[:, 2] / 0.2))
        seen = {"state": state, "action": action, "reward": reward, "is_up": is_up}
        return (after, is_up_after), seen

    state = 0.05 * jax.random.normal(keys[1], (EPISODES, 4))
    return jax.lax.scan(move, (state, jnp.ones(EPISODES, bool)), noise)[1]


def returns(rewards, decay: float = 0.98) -> jax.Array:
    """The discounted sums of what is still to come, along the first axis."""
    time = jnp.arange(len(rewards))
    return jnp.triu(decay ** (time - time[:, None])).astype(rewards.dtype) @ rewards


def mean_up(episodes, x) -> jax.Array:
    """The mean of `x` over the steps before the pole fell."""
    return (x * episodes["is_up"]).sum() / episodes["is_up"].sum()


def actor_critic_init(key):
    keys = jax.random.split(key)
    return {
        "policy": dense_init(keys[0], 4, 16, 2, gain=1.0),
        "value": dense_init(keys[1], 4, 32, 1),
    }


def minus_return_of_batch(task, params, batch, extra, key):
    del task, params, extra, key
    return -batch["reward"].sum() / EPISODES


def reinforce() -> Task:
    """Policy gradients on a cart pole; the baseline is the mean of the episodes."""

    def loss(params, batch, extra):
        del extra
        to_go = returns(batch["reward"])
        advantage = to_go - to_go.mean(1, keepdims=True)
        logs = log_chance(dense(params, batch["state"], jnp.tanh), batch["action"])
        return -mean_up(batch, logs * advantage)

    return Task(
        init=lambda key: dense_init(key, 4, 16, 2, gain=1.0),
        batch=lambda key, step, params, extra: play(key, params),
        loss=loss,
        measure=minus_return_of_batch,
    )


def a2c() -> Task:
    """Actor and critic on a cart pole; the loss of values grows with the return."""

    def loss(params, batch, extra):
        del extra
        values = dense(params["value"], batch["state"])[..., 0]
        error = returns(batch["reward"]) - values
        logits = dense(params["policy"], batch["state"], jnp.tanh)
        gain = log_chance(logits, batch["action"]) * jax.lax.stop_gradient(error)
        return mean_up(batch, jnp.square(error) / 2 - gain - 0.01 * entropy(logits))

    return Task(
        init=actor_critic_init,
        batch=lambda key, step, params, extra: play(key, params["policy"]),
        loss=loss,
        measure=minus_return_of_batch,
    )


def collect(key, params):
    """Episodes, with their normalized advantages and the chances of their actions."""
    episodes = play(key, params["policy"])
    to_go = returns(episodes["reward"])
    advantage = to_go - dense(params["value"], episodes["state"])[..., 0]
    advantage -= mean_up(episodes, advantage)
    std = jnp.sqrt(mean_up(episodes, jnp.square(advantage)))
    logits = dense(params["policy"], episodes["state"], jnp.tanh)
    return episodes | {
        "to_go": to_go,
        "advantage": advantage / (std + 1e-6),
        "old": log_chance(logits, episodes["action"]),
    }


def draw_of_episodes(key, step, params, extra, num=128):
    del params
    keys = jax.random.split(key)
    index = jax.random.randint(keys[0], (num,), 0, LENGTH * EPISODES)
    drawn = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[index], extra)
    return drawn | {"step": jnp.asarray(step), "key": keys[1]}


def clipped_loss(params, batch, extra):
    del extra
    logits = dense(params["policy"], batch["state"], jnp.tanh)
    ratio = jnp.exp(log_chance(logits, batch["action"]) - batch["old"])
    bounded = jnp.clip(ratio, 0.8, 1.2)
    gain = jnp.minimum(ratio * batch["advantage"], bounded * batch["advantage"])
    error = dense(params["value"], batch["state"])[..., 0] - batch["to_go"]
    each = jnp.square(error) / 2 - gain - 0.01 * entropy(logits)
    return mean_up(batch, each)


def ppo(every: int = 16) -> Task:
    """Proximal policy optimization on a cart pole; episodes are kept `every` steps."""
    return Task(
        init=actor_critic_init,
        batch=draw_of_episodes,
        loss=clipped_loss,
        extra=lambda params: collect(jax.random.key(0), params),
        follow=lambda extra, params, batch: jax.lax.cond(
            (batch["step"] + 1) % every == 0,
            lambda: collect(batch["key"], params),
            lambda: extra,
        ),
        measure=lambda task, params, batch, extra, key: minus_return_of_batch(
            task, params, play(key, params["policy"]), extra, key
        ),
    )


def ppo_of_old_episodes() -> Task:
    """Proximal policy optimization, whose episodes stay 160 steps."""
    return ppo(every=160)


# Rings and grids, of which the true values are known.


def draw_walk(key, step, params, extra):
    """Steps on a ring of 20 places, to either side, and what each is worth."""
    del params, extra
    keys = jax.random.split(key)
    x = jax.random.randint(keys[0], (64,), 0, 20)
    after = (x + jax.random.rademacher(keys[1], (64,), int)) % 20
    reward = 1 + jnp.sin(x * jnp.pi / 5)
    return {"x": x, "after": after, "reward": reward, "step": jnp.asarray(step)}


def values_of_walk(decay: float, *, uses_target: bool) -> Task:
    """Temporal differences of a random walk on a ring; judged by the true values."""
    moves = (jnp.roll(jnp.eye(20), 1, 0) + jnp.roll(jnp.eye(20), -1, 0)) / 2
    reward = 1 + jnp.sin(jnp.arange(20) * jnp.pi / 5)
    true = jnp.linalg.solve(jnp.eye(20) - decay * moves, reward)
    seen = jax.random.normal(jax.random.key(1), (20, 16))

    def loss(params, batch, extra):
        ahead = dense(extra if uses_target else params, seen)[batch["after"], 0]
        target = jax.lax.stop_gradient(batch["reward"] + decay * ahead)
        return squared_error(dense(params, seen)[batch["x"], 0], target)

    return Task(
        init=lambda key: dense_init(key, 16, 32, 1, gain=1.0),
        batch=draw_walk,
        loss=loss,
        extra=own_copy,
        follow=refreshed(50),
        measure=lambda task, params, *_: squared_error(dense(params, seen)[:, 0], true),
    )


def td0() -> Task:
    """Values of a random walk, learned from themselves; they grow to 20."""
    return values_of_walk(0.95, uses_target=False)


def td0_far_ahead() -> Task:
    """Values of a random walk, learned from themselves; they grow to 100."""
    return values_of_walk(0.99, uses_target=False)


def td0_target_network() -> Task:
    """Values of a random walk, learned from those of up to 50 steps before."""
    return values_of_walk(0.8, uses_target=True)


def grid() -> tuple[jax.Array, jax.Array]:
    """A room of 5 x 5 places and 4 moves: places after them, and their rewards."""
    place = jnp.stack(jnp.divmod(jnp.arange(25), 5), axis=-1)
    moves = jnp.array([[0, 1], [1, 0], [0, -1], [-1, 0]])
    after = jnp.clip(place[:, None] + moves, 0, 4) @ jnp.array([5, 1])
    reward = 5.0 * (after == 24)
    return jnp.where(after == 24, 0, after), reward


def true_action_values(ahead: Callable, decay: float) -> jax.Array:
    """`[places, moves]`: what `ahead` makes of the next ones is a place's value."""
    after, reward = grid()
    return jax.lax.fori_loop(
        0, 200, lambda _, q: reward + decay * ahead(q)[after], jnp.zeros((25, 4))
    )


def draw_moves(key, step, params, extra):
    """Random moves at random places of the room, with noisy rewards."""
    del params, extra
    keys = jax.random.split(key, 3)
    x = jax.random.randint(keys[0], (64,), 0, 25)
    move = jax.random.randint(keys[1], (64,), 0, 4)
    after, reward = (table[x, move] for table in grid())
    reward += 0.5 * jax.random.normal(keys[2], (64,))
    seen = {"x": x, "move": move, "after": after, "reward": reward}
    return seen | {"step": jnp.asarray(step)}


def action_values(ahead: Callable, init: Callable, every: int, features) -> Task:
    """Learns action values of random moves in the room; judged by the true ones.

    Args:
        ahead: From the values of the moves at a place to the value of the place.
        init: From a key to parameters of `dense`.
        every: After how many steps the target network is refreshed.
        features: `[places, num_in]` of the network, which has an output for each move.
    """
    true = true_action_values(ahead, decay=0.8)

    def loss(params, batch, extra):
        value = ahead(dense(extra, features))[batch["after"]]
        outputs = dense(params, features)[batch["x"], batch["move"]]
        return squared_error(outputs, batch["reward"] + 0.8 * value)

    return Task(
        init=init,
        batch=draw_moves,
        loss=loss,
        extra=own_copy,
        follow=refreshed(every),
        measure=lambda task, params, *_: squared_error(dense(params, features), true),
    )


def dqn() -> Task:
    """Values of the best moves in a room, with a target refreshed each 50 steps."""
    return action_values(
        lambda q: q.max(-1), lambda key: dense_init(key, 25, 32, 4), 50, jnp.eye(25)
    )


def sarsa() -> Task:
    """Linear values of random moves in a room, of large overlapping features."""
    features = 2 * jax.random.normal(jax.random.key(1), (25, 48))
    return action_values(
        lambda q: q.mean(-1), lambda key: dense_init(key, 48, 4), 1, features
    )


# A mass that is pushed along a line, and shall come to rest at zero.


def pushed(state, push) -> jax.Array:
    """The next position and velocity."""
    position, velocity = jnp.moveaxis(state, -1, 0)
    return jnp.stack([position + 0.2 * velocity, velocity + 0.2 * push[..., 0]], -1)


def drive(key, act: Callable, steps: int = 20, num: int = 32):
    """States `[steps, num, 2]` and pushes `[steps, num, 1]` under `act(state)`."""

    def move(state, _):
        push = act(state)
        return pushed(state, push), (state, push)

    first = jax.random.normal(key, (num, 2))
    return jax.lax.scan(move, first, length=steps)[1]


def cost(state, push) -> jax.Array:
    return jnp.square(state).sum(-1) + 0.1 * jnp.square(push).sum(-1)


def critic_value(players, state, push) -> jax.Array:
    return dense(players["critic"], jnp.concatenate([state, push], axis=-1))[..., 0]


def actor_and_critic_loss(params, batch, extra):
    state, push = batch
    after = pushed(state, push)
    ahead = critic_value(extra, after, dense(extra["actor"], after))
    target = cost(state, push) + 0.9 * ahead
    return {
        "actor": critic_value(params, state, dense(params["actor"], state)).mean(),
        "critic": squared_error(critic_value(params, state, push), target),
    }


def actor_and_critic_init(key):
    keys = jax.random.split(key)
    return {
        "actor": dense_init(keys[0], 2, 24, 1, gain=0.5),
        "critic": dense_init(keys[1], 3, 48, 1),
    }


def actor_and_critic() -> Task:
    """A policy descends a critic of its costs; that learns from a slow copy of both."""

    def draw(key, step, params, extra):
        state, noise = jnp.split(jax.random.normal(key, (64, 3)), [2], axis=-1)
        return state, dense(params["actor"], state) + noise

    def measure(task, params, batch, extra, key):
        return cost(*drive(key, lambda state: dense(params["actor"], state))).mean()

    return Task(
        init=actor_and_critic_init,
        batch=draw,
        loss=actor_and_critic_loss,
        extra=own_copy,
        follow=lambda extra, params, batch: jax.tree.map(
            lambda old, new: 0.95 * old + 0.05 * new, extra, params
        ),
        measure=measure,
        players=("actor", "critic"),
    )


def expert(state) -> jax.Array:
    return jnp.tanh(-state @ jnp.array([[1.5], [2.0]]))


def imitation() -> Task:
    """Learns what an expert does where the learner of up to 100 steps ago came to."""

    def draw(key, step, params, extra):
        del params
        state, _ = drive(key, lambda state: dense(extra, state))
        return {"state": state, "push": expert(state), "step": jnp.asarray(step)}

    return Task(
        init=lambda key: dense_init(key, 2, 32, 1, gain=0.3),
        batch=draw,
        loss=lambda params, batch, extra: squared_error(
            dense(params, batch["state"]), batch["push"]
        ),
        extra=own_copy,
        follow=refreshed(100),
    )


def world_model() -> Task:
    """Predicts the next state of a cart pole, under a policy that changes."""

    def draw(key, step, params, extra):
        del params, extra
        keys = jax.random.split(key)
        state = jax.random.normal(keys[0], (64, 4)) * jnp.array([1.0, 1.0, 0.3, 1.0])
        angle = 2 * jnp.pi * step / 300 + jnp.arange(4)
        push = jnp.tanh(2 * state @ jnp.sin(angle)[:, None])
        change = cartpole(state, push[:, 0]) - state
        return jnp.concatenate([state, push], axis=-1), 10 * change

    return Task(
        init=lambda key: dense_init(key, 5, 48, 4),
        batch=draw,
        loss=lambda params, batch, extra: squared_error(
            dense(params, batch[0]), batch[1]
        ),
    )


# Choices of a single move.


def bandit() -> Task:
    """Policy gradients of a choice among 5 for each context; the rewards are noisy."""
    wanted = normal(jax.random.key(1), 8, 5, 2.0)

    def draw(key, step, params, extra):
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (128, 8))
        move = jax.random.categorical(keys[1], dense(params, x))
        reward = jnp.take_along_axis(x @ wanted, move[:, None], axis=-1)[:, 0]
        noise = 0.5 * jax.random.normal(keys[2], (128,))
        return {"x": x, "move": move, "reward": reward + noise}

    def loss(params, batch, extra):
        advantage = batch["reward"] - batch["reward"].mean()
        logs = log_chance(dense(params, batch["x"]), batch["move"])
        return -(logs * advantage).mean()

    return Task(
        init=lambda key: dense_init(key, 8, 32, 5, gain=0.5),
        batch=draw,
        loss=loss,
        measure=lambda task, params, batch, extra, key: -batch["reward"].mean(),
    )


def words(params, x) -> jax.Array:
    """Logits of the answer to each x: `[..., words, 4]`."""
    return dense(params, x).reshape(*x.shape[:-1], -1, 4)


def draw_answers(key, step, params, extra):
    """Eight answers to each of 16 questions, and the share of right words in each."""
    del step, extra
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (16, 8))
    logits = jnp.broadcast_to(words(params, x), (8, 16, 6, 4))
    answer = jax.random.categorical(keys[1], logits)
    best = words(dense_init(jax.random.key(1), 8, 24), x).argmax(-1)
    reward = (answer == best).mean(-1)
    old = log_chance(logits, answer)
    return {"x": x, "answer": answer, "old": old, "reward": reward}


def grpo() -> Task:
    """Answers of six words, judged against their group, near a frozen reference."""

    def loss(params, batch, extra):
        reward = batch["reward"]
        advantage = (reward - reward.mean(0)) / (reward.std(0) + 1e-3)
        logits = words(params, batch["x"])
        spread = jnp.broadcast_to(logits, (*batch["answer"].shape, 4))
        ratio = jnp.exp(log_chance(spread, batch["answer"]) - batch["old"])
        logs, frozen = map(jax.nn.log_softmax, (logits, words(extra, batch["x"])))
        kl = (jnp.exp(logs) * (logs - frozen)).sum(-1)
        return 0.02 * kl.mean() - (ratio * advantage[..., None]).mean()

    return Task(
        init=lambda key: dense_init(key, 8, 32, 24, gain=0.7),
        batch=draw_answers,
        loss=loss,
        extra=own_copy,
        measure=lambda task, params, batch, extra, key: -batch["reward"].mean(),
    )


def draw_preferences(key, step, params, extra):
    """Contexts, and for each two of 16 choices, the preferred one first."""
    del step, params, extra
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (128, 8))
    pair = jax.random.randint(keys[1], (128, 2), 0, 16)
    taste = x @ normal(jax.random.key(1), 8, 16, 4.0)
    first, second = jnp.take_along_axis(taste, pair, axis=-1).T
    is_first = jax.random.bernoulli(keys[2], jax.nn.sigmoid(first - second))
    return {"x": x, "pair": jnp.where(is_first[:, None], pair, pair[:, ::-1])}


def preferences() -> Task:
    """Direct preference optimization of choices, against a frozen reference."""

    def loss(params, batch, extra):
        logs = jax.nn.log_softmax(dense(params, batch["x"]))
        logs -= jax.nn.log_softmax(dense(extra, batch["x"]))
        chosen, rejected = jnp.take_along_axis(logs, batch["pair"], axis=-1).T
        return jax.nn.softplus(-0.5 * (chosen - rejected)).mean()

    return Task(
        init=lambda key: dense_init(key, 8, 32, 16, gain=1.0),
        batch=draw_preferences,
        loss=loss,
        extra=own_copy,
    )


def random_directions() -> Task:
    """A quadratic, measured in 8 directions with heavy-tailed noise."""
    curvature = jnp.logspace(0, 1.5, 24)

    def height(x):
        return 0.5 * (curvature * jnp.square(x)).sum(-1)

    def draw(key, step, params, extra):
        keys = jax.random.split(key)
        direction = jax.random.rademacher(keys[0], (8, 24), jnp.float32)
        rise = height(params + 0.01 * direction) - height(params - 0.01 * direction)
        noise = jax.random.t(keys[1], 2.5, (8,))
        return {"direction": direction, "slope": rise / 0.02 + noise}

    def loss(params, batch, extra):
        slope = batch["slope"] @ batch["direction"] / 8
        move = params - jax.lax.stop_gradient(params)
        return jax.lax.stop_gradient(height(params)) + (slope * move).sum()

    return Task(
        init=lambda key: jax.random.normal(key, (24,)),
        batch=draw,
        loss=loss,
        measure=lambda task, params, batch, extra, key: height(params),
    )

"""The ring buffer: past responses, tagged with the version of the policy that wrote them.

At training step k (k steps are complete, the policy is π_k) the history that may be drawn is what versions
k − N … k − 1 wrote, N being the window. ReMix (arXiv 2507.06892) draws i ~ ν, then a sample of π_{k−i}; the form of ν
is not published. Uniform over all that is held is inferred; any other ν is a dict of weights given to `sample`.

A sample is a dict of 1-D CPU tensors and scalars. A group is the list of the n samples written together for one prompt:
it is stored and drawn whole, so that its baseline (GRPO) stays what it was.

The buffer holds references, not copies: the trainer copies what it adds to.
"""


class RingBuffer:
    """Groups of the last `window` versions (training steps). len() is the number of groups held.

    Each operation depends on the contents, their order and the given rng only, so that ranks which push the same groups
    and seed alike draw the same. Raises ValueError if window is negative; 0 holds nothing.
    """

    def __init__(self, window):
        if window < 0:
            raise ValueError(f"window {window}: must be 0 or more training steps")
        self.window = window
        self._entries = []  # [(version, [group, …]), …], oldest first

    def __len__(self):
        return sum(len(groups) for _, groups in self._entries)

    def versions(self):
        """The versions held, oldest first. A version that wrote no group is not held."""
        return [version for version, _ in self._entries]

    def push(self, version, groups):
        """Add the groups (list of lists of samples) that π_version wrote; evict what no later step could draw.

        The next step is version + 1 at the earliest and draws v ≥ version + 1 − window: older versions go.
        An empty list of groups adds nothing and evicts all the same.
        Raises ValueError, leaving the buffer as it was, if `version` is not newer than all versions held, if a group is
        not a non-empty list of dicts, or if a sample carries another "version".
        """
        groups = list(groups)  # ours: the caller may go on with its list
        if self._entries and version <= self._entries[-1][0]:
            raise ValueError(
                f"version {version} is not newer than {self._entries[-1][0]}, the newest held"
            )
        for group in groups:
            if (
                not isinstance(group, list)
                or not group
                or not all(isinstance(sample, dict) for sample in group)
            ):
                raise ValueError("a group must be a non-empty list of samples (dicts)")
            for sample in group:
                if "version" in sample and int(sample["version"]) != version:
                    raise ValueError(
                        f"a sample of version {int(sample['version'])} was pushed as version {version}"
                    )
        if groups:
            self._entries.append((version, groups))
        self._entries = [entry for entry in self._entries if entry[0] >= version + 1 - self.window]

    def sample(self, n_groups, version, rng, weights=None):
        """Draw up to n_groups whole groups with version − window ≤ v < version, without replacement; a list of groups.

        rng: random.Random. All eligible groups are equally likely, or in proportion to weights[age], where
        weights: dict of age (version − v, from 1 to window) to a weight ≥ 0 and ages left out have weight 0. The weight
        is per group: with as many groups from every version, it is the paper's ν over i.
        Fewer groups come back when fewer are eligible. Raises ValueError on a negative n_groups or weight, and on a
        weight that is not finite.
        """
        if n_groups < 0:
            raise ValueError(f"n_groups {n_groups} is negative")
        eligible = [
            (version - v, group)
            for v, groups in self._entries
            if version - self.window <= v < version
            for group in groups
        ]  # oldest first, as pushed: the order that the rng's numbers refer to
        if weights is None:
            return [group for _, group in rng.sample(eligible, min(n_groups, len(eligible)))]
        if not all(0 <= weight < float("inf") for weight in weights.values()):
            raise ValueError(f"weights must be finite and not negative: {weights}")
        # Draws without replacement in proportion to w are a race: every group arrives after an exponential time of
        # rate w, and the first n win (Efraimidis and Spirakis 2006).
        race = [
            (rng.expovariate(weights[age]), group)
            for age, group in eligible
            if weights.get(age, 0) > 0
        ]
        return [group for _, group in sorted(race, key=lambda entry: entry[0])[:n_groups]]

    def state_dict(self):
        """{"window": int, "entries": [(version, groups), …]}, oldest first; shares the groups with the buffer."""
        return {
            "window": self.window,
            "entries": [(version, list(groups)) for version, groups in self._entries],
        }

    def load_state_dict(self, state):
        """Replace the contents by a `state_dict`. Our own window holds, not the saved one: a smaller one evicts."""
        fresh = RingBuffer(self.window)
        for version, groups in state["entries"]:
            fresh.push(version, groups)
        self._entries = fresh._entries

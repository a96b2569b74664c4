"""The slow twin of InfLoRA: the published algorithm for one layer, step by step in numpy, from the raw inputs.

It keeps the basis that DualGPM keeps, works on singular vectors of the projected matrix and never on eigenvectors
within a subspace. Its matrix is the inputs themselves, as in the paper, or their second moment, as in the published
code, whose first task also stops one direction short.
"""

import numpy as np


class SlowInfLora:
    """One layer's memory. Shapes: d input features, inputs (rows, d), basis (d, k)."""

    def __init__(self, features: int, *, reference: bool, threshold: float, final: float, tasks: int):
        self.features, self.reference = features, reference
        self.threshold, self.final, self.tasks = threshold, final, tasks
        self.basis = np.zeros((features, 0))
        self.kept = "protected"
        self.task = 0

    def matrix(self, inputs):
        """What is decomposed. Shapes: (d, m)."""
        rows = inputs.astype(np.float64)
        return rows.T @ rows / len(rows) if self.reference else rows.T / np.sqrt(len(rows))

    def protected(self):
        """The projector on what earlier tasks use. Shapes: (d, d)."""
        onto = self.basis @ self.basis.T
        return onto if self.kept == "protected" else np.eye(self.features) - onto

    def design(self, inputs, rank):
        """The frozen factor of the next task: leading left singular vectors of the matrix without what is protected."""
        matrix = self.matrix(inputs)
        onto = self.basis @ self.basis.T @ matrix
        free = matrix - onto if self.kept == "protected" else onto
        return np.linalg.svd(free)[0][:, :rank].T / np.sqrt(3)

    def update(self, inputs):
        """Take the finished task's inputs up."""
        matrix = self.matrix(inputs)
        share = self.threshold + (self.final - self.threshold) * self.task / self.tasks
        if self.task == 0:
            self.begin(matrix, share)
        elif self.kept == "protected":
            self.expand(matrix, share)
        else:
            self.reduce(matrix, share)
        if self.kept == "protected" and 2 * self.basis.shape[1] > self.features:
            whole = np.linalg.svd(self.basis)[0]
            self.basis, self.kept = whole[:, self.basis.shape[1] :], "free"
        self.task += 1

    def begin(self, matrix, share):
        vectors, sizes, _ = np.linalg.svd(matrix)
        below = int((np.cumsum(sizes**2) / (sizes**2).sum() < share).sum())
        self.basis = vectors[:, : max(1, below if self.reference else below + 1)]

    def expand(self, matrix, share):
        rest = matrix - self.basis @ self.basis.T @ matrix
        vectors, sizes, _ = np.linalg.svd(rest)
        total = (matrix**2).sum()
        inside, count = (total - (rest**2).sum()) / total, 0
        while inside < share:
            inside += sizes[count] ** 2 / total
            count += 1
        self.basis = np.hstack([self.basis, vectors[:, :count]])

    def reduce(self, matrix, share):
        free = self.basis @ self.basis.T @ matrix
        vectors, sizes, _ = np.linalg.svd(free)
        total = (matrix**2).sum()
        outside, count = (free**2).sum() / total, 0
        while outside > 1 - share:
            outside -= sizes[count] ** 2 / total
            count += 1
        taken = vectors[:, :count]
        left = np.linalg.svd(self.basis - taken @ taken.T @ self.basis)[0]
        self.basis = left[:, : self.basis.shape[1] - count]

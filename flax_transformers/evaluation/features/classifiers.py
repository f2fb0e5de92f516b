"""Classifiers of frozen features: nearest neighbours, and a linear probe.

Shape suffixes: N examples, D features, C classes, K neighbours.
"""

from __future__ import annotations

import numpy as np

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of DINO (arXiv:2104.14294, section 4.2 and appendix F.1)."""
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Weights of the squared norm that `linear_probe` chooses from."""
_STEPS = 1000
_ROWS = 1024  # scored at once
_CHOSEN_ON = 0.1  # share of the training examples that the penalty is chosen on


def nearest_neighbours(
    train_ND: np.ndarray,
    labels_N: np.ndarray,
    test_ND: np.ndarray,
    classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """The predicted class of each row of ``test_ND``, int64 [N].

    The ``neighbours`` of greatest cosine similarity s vote with exp(s / temperature).
    """
    train_ND, test_ND = _normalized(train_ND), _normalized(test_ND)
    neighbours = min(neighbours, len(train_ND))
    found = []
    for start in range(0, len(test_ND), _ROWS):
        similar = test_ND[start : start + _ROWS] @ train_ND.T
        near_NK = np.argpartition(-similar, neighbours - 1, axis=1)[:, :neighbours]
        score_NK = np.exp(np.take_along_axis(similar, near_NK, axis=1) / temperature)
        votes_NC = np.zeros((len(similar), classes))
        np.add.at(votes_NC, (np.arange(len(similar))[:, None], labels_N[near_NK]), score_NK)
        found.append(votes_NC.argmax(axis=1))
    return np.concatenate(found)


def _normalized(rows_ND: np.ndarray) -> np.ndarray:
    length_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return rows_ND / np.maximum(length_N1, 1e-12)


def linear_probe(
    train_ND: np.ndarray, labels_N: np.ndarray, test_ND: np.ndarray, classes: int
) -> tuple[np.ndarray, float]:
    """The predicted class of each row of ``test_ND``, int64 [N], and the penalty that was chosen.

    Logistic regression by L-BFGS on features with mean 0 and variance 1, as of a batch norm without
    parameters (MAE, arXiv:2111.06377, appendix A.1). The penalty is the one of `PENALTIES` with
    the least loss on every tenth training example of each class when it is fitted on the others;
    then all are fitted.
    """
    mean_D, std_D = train_ND.mean(axis=0, dtype=np.float64), train_ND.std(axis=0, dtype=np.float64)
    scale_D = 1 / np.where(std_D > 1e-6, std_D, 1.0)
    train_ND, test_ND = ((rows - mean_D) * scale_D for rows in (train_ND, test_ND))
    held_out_N = _tenth_of_each_class(labels_N, classes)
    penalty = PENALTIES[-1]
    if held_out_N.any():
        losses = []
        weights = np.zeros((train_ND.shape[1] + 1, classes))
        for one in reversed(PENALTIES):  # from the strongest, each fit starts at the one before
            weights = _fitted(train_ND[~held_out_N], labels_N[~held_out_N], weights, one)
            losses.append(_loss(train_ND[held_out_N], labels_N[held_out_N], weights)[0])
        penalty = PENALTIES[::-1][int(np.argmin(losses))]
    start = np.zeros((train_ND.shape[1] + 1, classes))
    weights = _fitted(train_ND, labels_N, start, penalty)
    return (test_ND @ weights[:-1] + weights[-1]).argmax(axis=1), penalty


def _tenth_of_each_class(labels_N: np.ndarray, classes: int) -> np.ndarray:
    """A mask bool [N] of one in ten examples of each class, at least one of two or more."""
    mask_N = np.zeros(len(labels_N), bool)
    for number in range(classes):
        own = np.flatnonzero(labels_N == number)
        mask_N[own[1 :: max(2, round(1 / _CHOSEN_ON))]] = True
    return mask_N


def _fitted(
    rows_ND: np.ndarray, labels_N: np.ndarray, start: np.ndarray, penalty: float
) -> np.ndarray:
    """The weights [D + 1, C], the biases last, that minimise the mean cross-entropy plus half the
    ``penalty`` times the squared norm of the weights without biases."""
    from scipy.optimize import minimize  # slow to import

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(start.shape)
        value, gradient = _loss(rows_ND, labels_N, weights)
        gradient[:-1] += penalty * weights[:-1]
        return value + penalty / 2 * float((weights[:-1] ** 2).sum()), gradient.ravel()

    options = {"maxiter": _STEPS}
    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(start.shape)


def _loss(
    rows_ND: np.ndarray, labels_N: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray]:
    """Mean cross-entropy, and its gradient [D + 1, C]."""
    logits_NC = rows_ND @ weights[:-1] + weights[-1]
    logits_NC -= logits_NC.max(axis=1, keepdims=True)
    share_NC = np.exp(logits_NC)
    total_N1 = share_NC.sum(axis=1, keepdims=True)
    own = np.arange(len(labels_N)), labels_N
    value = float((np.log(total_N1[:, 0]) - logits_NC[own]).mean())
    share_NC /= total_N1
    share_NC[own] -= 1
    share_NC /= len(labels_N)
    return value, np.concatenate([rows_ND.T @ share_NC, share_NC.sum(axis=0, keepdims=True)])

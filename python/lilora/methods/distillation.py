"""Distillation of one model's next-token distributions into another's, without an fp32 copy of all logits."""

import torch
from torch import Tensor

ROWS = 512  # positions whose logits are widened at a time


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, vocabulary: int | None = None) -> Tensor:
    """Mean over positions of KL(softmax(teacher / T) || softmax(student / T)), an fp32 scalar.

    student, teacher: logits [..., V]; only the student gets a gradient. vocabulary: over the teacher's so many largest
    logits of each position instead of all; with T = 2 that is PCLR's loss on square-rooted probabilities.
    """
    if vocabulary is None or vocabulary >= teacher.shape[-1]:
        return _Divergence.apply(
            student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1]), temperature
        )
    values, chosen = teacher.detach().topk(vocabulary, -1)
    target = (values.float() / temperature).log_softmax(-1)
    log_p = (student.gather(-1, chosen).float() / temperature).log_softmax(-1)
    return (target.exp() * (target - log_p)).sum(-1).mean()


class _Divergence(torch.autograd.Function):
    """The gradient, (softmax(student / T) - softmax(teacher / T)) / T, is made with the loss, in the student's dtype."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(student)
        total = student.new_zeros((), dtype=torch.float32)
        for part, target, out in zip(student.split(ROWS), teacher.split(ROWS), gradient.split(ROWS), strict=True):
            log_p = (part.float() / temperature).log_softmax(-1)
            log_q = (target.float() / temperature).log_softmax(-1)
            q = log_q.exp()
            total += (q * (log_q - log_p)).sum()
            out.copy_((log_p.exp() - q) / (temperature * len(student)))
        ctx.save_for_backward(gradient)
        return total / len(student)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad, None, None

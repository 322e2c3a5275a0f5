"""Distillation of one model's next-token distributions into another's, without an fp32 copy of all logits."""

import torch
from torch import Tensor

ROWS = 512  # positions whose logits are widened at a time


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, vocabulary: int | None = None) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) at each position, fp32: logits [..., V] -> [...].

    Only the student gets a gradient. vocabulary: over the teacher's so many largest logits of each position instead of
    all; with T = 2 that is PCLR's loss on square-rooted probabilities.
    """
    if vocabulary is None or vocabulary >= teacher.shape[-1]:
        flat = (logits.reshape(-1, logits.shape[-1]) for logits in (student, teacher))
        return _Divergence.apply(*flat, temperature).view(student.shape[:-1])
    values, chosen = teacher.detach().topk(vocabulary, -1)
    target = (values.float() / temperature).log_softmax(-1)
    log_p = (student.gather(-1, chosen).float() / temperature).log_softmax(-1)
    return (target.exp() * (target - log_p)).sum(-1)


class _Divergence(torch.autograd.Function):
    """The gradient, (softmax(student / T) - softmax(teacher / T)) / T, is made with the loss, in the student's dtype."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(student)
        losses = student.new_empty(len(student), dtype=torch.float32)
        parts = (rows.split(ROWS) for rows in (student, teacher, gradient, losses))
        for part, target, out, loss in zip(*parts, strict=True):
            log_p = (part.float() / temperature).log_softmax(-1)
            log_q = (target.float() / temperature).log_softmax(-1)
            q = log_q.exp()
            loss.copy_((q * (log_q - log_p)).sum(-1))
            out.copy_((log_p.exp() - q) / temperature)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad.unsqueeze(-1).to(ctx.saved_tensors[0].dtype), None, None

"""Chats projected on persona vectors, turn by turn, before and after the model speaks (arXiv:2507.21509, section 3.3).

The last prompt token's projection predicts the trait of the response to come; the mean over the response says what
came.
Knows nothing about who said it: chats come in, numbers go out.
"""

"""Monitor chats: project them on persona vectors before and after the model speaks (arXiv:2507.21509, section 3.3).

The last prompt token's projection predicts the trait of the response to come; the mean over the response measures it.
"""

"""Model + loss (+ AML) in one nn.Module, so that Accelerate's engines see one forward and one backward per batch."""

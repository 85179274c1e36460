"""The mixture-of-experts layer: route, dispatch, run the experts, combine.

Names of tensors end in their shape:

```
T  tokens                    D  width of the model        V  vocabulary
E  experts                   F  hidden width of an expert S  slots of a cache
K  experts of one token      R  rows of an expert's first matrix: 2F if it is gated, else F
N  assignments, T x K        M  rows given to one expert  H  heads   L  length
```
"""

"""`python -m amltrain COMMAND`, and `accelerate launch -m amltrain train`."""

from amltrain.cli import main

if __name__ == "__main__":
    main()

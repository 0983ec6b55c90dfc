# Each target is one call of course.py, which works the same on Windows and macOS.
# More arguments: make test ARGS="-k models", make lab ARGS="--no-browser --port 8899".
PYTHON ?= python3
ARGS ?=

.PHONY: help lab test notebooks models experiments bench slides learner site bundle versions

help:
	@$(PYTHON) course.py --help

lab test notebooks models experiments bench slides learner site bundle versions:
	@$(PYTHON) course.py $@ -- $(ARGS)

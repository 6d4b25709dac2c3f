.DEFAULT_GOAL := help
.PHONY: help setup run test promise check fix lock browser soak ci
bin := .venv/bin

help: ## Show this list.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: .venv ## Install everything into .venv.

.venv: requirements.txt requirements-dev.txt
	python3 -m venv .venv
	$(bin)/pip install -r requirements-dev.txt
	touch .venv

run: .venv ## Serve the demo shop, and reload it when a file changes.
	$(bin)/flask run --debug

test: .venv ## Run the tests, on SQLite and PostgreSQL.
	$(bin)/pytest

check: .venv ## Check style, types and prose, within a minute.
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/python .ci/prose

fix: .venv ## Format the code, and fix the errors that ruff can fix.
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

lock: .venv ## Renew requirements.lock, the versions and hashes of a deployment.
	CUSTOM_COMPILE_COMMAND="make lock" $(bin)/pip-compile --quiet --upgrade --generate-hashes --strip-extras \
		--no-emit-options --output-file requirements.lock requirements.txt

promise: .venv ## Run the tests with real fleets under faults, for some minutes.
	$(bin)/pytest -m promise

browser: .venv ## Run the tests in a Chromium.
	$(bin)/pytest -m browser --dist loadfile

soak: .venv ## Run workers under faults for a minute on each database.
	$(bin)/python -m benchmarks.soak --engine sqlite --minutes 1
	$(bin)/python -m benchmarks.soak --engine postgresql --minutes 1

ci: ## Run everything that CI runs. Needs Debian and root.
	bash .ci/run

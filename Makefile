# The one entry. `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.PHONY: help setup build native lint format test

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 18

setup: ## Install what is missing (Debian packages, pnpm, dependencies)
	@tools/setup.sh

native: ## Build the native addon and the keeper
	pnpm build:native

build: native ## Build everything
	pnpm build

lint: ## Lint and check the formatting
	pnpm generate && pnpm lint && pnpm format:check

format: ## Format TypeScript and JSON
	pnpm format

test: build ## All tests
	pnpm test

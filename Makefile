# The one entry: `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
export PATH := $(CURDIR)/.cache/pnpm/node_modules/.bin:$(CURDIR)/.cache/bin:$(PATH)
.PHONY: help setup native build demo test test-node lint format bench sanitize crash faults tidy clean images manifests e2e-tools e2e conformance
.PHONY: kind-up kind-down kind-node-image

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 12

setup: ## Install what is missing: Debian packages, pnpm, npm dependencies
	@tools/setup.sh

native: setup ## Build the native addon and the keeper
	@tools/quiet.sh native pnpm build:native

build: native ## Build everything
	@tools/quiet.sh typescript pnpm build

demo: build ## One volume's whole life on three nodes, a node killed on the way
	@node packages/cli/dist/demo/main.js

test: build ## All tests: unit, native, format crash test, store contract, CSI on real devices, csi-sanity
	@tools/setup-tests.sh
	@node tools/test.mjs

test-node: ## All tests under another Node.js: make test-node NODE=24
	@tools/with-node.sh $(or $(NODE),24) $(MAKE) test

lint: setup ## Lint and check the formatting
	@pnpm generate >/dev/null && pnpm lint && pnpm format:check

format: setup ## Format TypeScript and JSON
	@pnpm format

crash: setup ## The format crash test over many seeds: make crash SEEDS=1..1000
	@node tools/test.mjs crash --seeds $(or $(SEEDS),1..1000)

sanitize: build ## Native tests under ASan, UBSan and TSan; the addon's tests under ASan
	@tools/setup-tests.sh
	@node tools/test.mjs sanitize

faults: build ## Long fault tests: 20 node kills, 20 agent kills under fio verify, a frozen engine, snapshots under load, compaction
	@HOLDFAST_LONG=1 node tools/test.mjs faults

bench: build ## fio side by side with the raw disk and qemu-storage-daemon, control plane, memory
	@node bench/run.mjs

images: build ## The container images as OCI archives in .cache/images, without Docker
	@node tools/images.mjs --out .cache/images

manifests: ## Render the chart to deploy/kubernetes (helm, or make e2e-tools)
	@node tools/manifests.mjs

e2e-tools: ## Kubernetes, the CSI sidecars and Helm into ~/.cache/holdfast-e2e (half an hour, once)
	@tools/e2e-tools.sh

e2e: build e2e-tools ## A three-node Kubernetes on this machine: chart, volumes, snapshots, moves
	@node test/e2e/run.mjs $(if $(MINUTES),--minutes $(MINUTES))

conformance: build e2e-tools ## Kubernetes' own storage specs on that cluster (tools: another half an hour, once; the specs: twenty minutes)
	@tools/conformance-tools.sh
	@node test/e2e/run.mjs --lab conformance/lab.mjs --minutes 150

kind-up: build ## A three-node kind cluster over a shared loop disk, with Holdfast and a sample (docker, kind, helm)
	@deploy/kind/up.sh

kind-down: ## Take that cluster away
	@deploy/kind/down.sh

kind-node-image: build e2e-tools ## A node image for kind where there is no container registry (docker, debootstrap, Go)
	@node deploy/kind/node-image/build.mjs

clean: ## Remove what was built (not the caches)
	rm -rf native/build native/build-* packages/*/dist native/dist packages/proto/src/gen packages/*/*.tsbuildinfo native/*.tsbuildinfo

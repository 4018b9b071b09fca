//go:build tools

// Package tools keeps the pinned modules of go.mod in use, so that `go mod tidy` leaves their versions alone.
package tools

import (
	_ "github.com/container-storage-interface/spec/lib/go/csi"
	_ "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity"
)

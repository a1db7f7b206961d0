// istiod and istioctl, as Istio's own module has them: `make istiod`. Nothing of ours is compiled.
// The Gateway API's definitions and those of InferencePool are read from the modules that Istio was built against.
module tokenway.test/istio

go 1.26.0

tool (
	istio.io/istio/istioctl/cmd/istioctl
	istio.io/istio/pilot/cmd/pilot-discovery
)

require istio.io/istio v0.0.0-20260827124520-eed52ebb66ad

// etcd for the API server of the tests: `make kubernetes`. Nothing of ours is compiled.
module tokenway.test/etcd

go 1.26.0

tool go.etcd.io/etcd/server/v3

require go.etcd.io/etcd/server/v3 v3.6.16

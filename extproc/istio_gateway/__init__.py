"""Istio's resources that make an Istio gateway's Envoy do what our own bootstrap does."""

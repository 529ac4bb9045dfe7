"""Helpers of the tests: servers, peers, payloads, and parts of the receiver inside a test."""

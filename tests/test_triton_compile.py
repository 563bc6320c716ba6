import torch
def inputs(dtype, V, K=1):
    return dict(logits=torch.zeros(6,V,dtype=dtype), ids=torch.zeros(6,K,dtype=torch.int64))
def forward(dtype, V, entropy, mask=False, K=1):
    def launch():
        from fusedpo.triton_kernels import logprobs
        m = torch.ones(6,dtype=torch.bool) if mask else None
        logprobs.token_logprobs(torch.zeros(6,V,dtype=dtype), torch.zeros(6,K,dtype=torch.int64), torch.ones(()), m, entropy)
    return launch
def backward(dtype, V, lp, ent, mask=False, K=1):
    def launch():
        from fusedpo.triton_kernels import logprobs
        m = torch.ones(6,dtype=torch.bool) if mask else None
        logprobs.token_logprobs_backward(torch.zeros(6,K) if lp else None, torch.zeros(6) if ent else None, torch.zeros(6,V,dtype=dtype), torch.zeros(6,K,dtype=torch.int64), torch.ones(()), m, torch.zeros(6,3))
    return launch
b=torch.bfloat16; f=torch.float32
CASES = {
 "f bf16 wide": forward(b,151936,True,True),
 "f bf16 wide noent": forward(b,151936,False,True),
 "f bf16 narrow": forward(b,50257,False),
 "f fp32": forward(f,151936,True),
 "f short": forward(b,1000,True,K=4),
 "b bf16": backward(b,151936,True,True,True),
 "b narrow": backward(b,50257,True,False),
 "b fp32 K4": backward(f,151936,True,True,K=4),
 "b short": backward(b,1000,False,True),
}

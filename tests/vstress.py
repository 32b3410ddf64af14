import sys, torch, numpy as np, hashlib
from ranks import run_ranks
from toys import *
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.parallel.vocab import token_logprobs
import dataclasses
BIG=dataclasses.replace(GPT2_LIKE, hidden_size=64, max_sequence_length=256)
def stress(n, dealloc, virtual):
    role=make_role(BIG, ParallelConfig(pipeline=2, virtual_stages=virtual))
    tr=train(role)
    role.chunks[0].config.deallocate_pipeline_outputs=dealloc
    for c in role.modules: c.config.deallocate_pipeline_outputs=dealloc
    out=[]
    for i in range(n):
        mbs=[]
        for k,L in enumerate([50,200,70,200,30,90]):
            t=torch.randint(0,67,(2,L),generator=torch.Generator().manual_seed(k))
            def loss_of(logits,t=t):
                loss=-token_logprobs(logits[:,:-1],t[:,1:],None).mean()
                return loss,{"loss":loss.detach()}
            mbs.append(Microbatch(t,loss_of))
        b=gradient_blocks(tr,mbs)
        out.append(float(sum((x.values.astype(np.float64)**2).sum() for x in b)))
    return out
if __name__=="__main__":
    for virtual, d in ((2,True),(2,False),(1,True)):
        r=run_ranks(2, stress, 60, d, virtual, timeout=400)
        for k,x in enumerate(r):
            x=np.array(x); m=np.median(x)
            print("virtual",virtual,"dealloc",d,"rank",k,"bad",int((abs(x/m-1)>1e-9).sum()),"of",len(x), x[abs(x/m-1)>1e-9][:4], m, flush=True)

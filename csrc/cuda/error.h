// A status below zero is a CUDA error.
#pragma once

extern "C" const char* svag_cuda_error_name(int status);
extern "C" const char* svag_cuda_error_text(int status);
